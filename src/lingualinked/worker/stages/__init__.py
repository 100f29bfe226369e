"""The stages of a worker, with their sessions."""

"""A cluster made on a running Ray cluster."""

"""The sentiment head of the bundled checkpoint."""

"""New tokens of several sessions in one pass."""

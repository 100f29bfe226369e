"""Proves that an architecture can be cut, by trying a small copy of it."""

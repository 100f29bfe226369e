"""Measurements against the unsharded model, both sides in one run.

Knows the public face, processes and clocks; nothing in the library depends on it.
"""

"""What the library is measured by: each benchmark runs all its sides in turn, in one run.

Knows the public face, processes and clocks; nothing in the library depends on it.
"""

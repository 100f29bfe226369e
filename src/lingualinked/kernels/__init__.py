"""Machine code for what torch computes slowly, with torch's bits.

Knows buffers and the processor; no layers, and no models.
"""

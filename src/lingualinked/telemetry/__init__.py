"""Records of a running pipeline: samples, decisions, migrations and totals, and their export.

Knows no sockets and no tensors.
"""

"""What running workers report about themselves, as plain data.

Knows no sockets and no tensors.
"""

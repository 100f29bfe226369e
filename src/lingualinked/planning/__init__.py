"""Deciding which device holds which layers.

Knows plain numbers only: no torch, no sockets, no processes.
"""

"""Weights, adapters and their files: lent, borrowed, fetched, read and edited."""

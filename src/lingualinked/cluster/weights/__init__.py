"""Weights, adapters and their files, in the workers that hold them."""

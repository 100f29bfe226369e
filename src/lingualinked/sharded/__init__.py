"""The transformers-facing API of a model that runs in stages.

Knows transformers' calls and conventions; neither processes nor sockets.
"""

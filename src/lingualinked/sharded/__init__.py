"""The Hugging Face face of a model that runs in stages.

Knows transformers' ways of asking; neither processes nor sockets.
"""

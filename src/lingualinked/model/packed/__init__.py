"""Several texts in one forward pass of a stage, without padding: linear layers see all tokens, attention each text alone.

Knows stages, their KV caches and transformers' interfaces for attention and masks; no sessions and no messages.
"""

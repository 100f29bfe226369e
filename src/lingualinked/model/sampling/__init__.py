"""Chooses tokens from logits as transformers' ``generate`` does, in whichever process the logits are.

Knows transformers' logits processors; no sessions and no messages.
"""

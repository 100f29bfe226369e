"""Continuous batching: hundreds of prompts at once, joined and retired at every step.

Knows transformers' manager, its requests and packed steps; neither stages nor messages.
"""

"""Continuous batching: hundreds of prompts at once, joined and retired at every step."""

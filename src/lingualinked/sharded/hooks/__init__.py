"""Hooks of submodules, run in the thread that called the model."""

"""The caller's side: start workers, place a plan on them, drive steps through it.

Knows processes, keys and messages; neither how a stage computes nor what a tokenizer is.
"""

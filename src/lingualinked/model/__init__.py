"""Finds the parts of a Hugging Face model, and cuts, loads and runs one stage of it.

Knows torch and transformers; knows no sockets, no processes and no plan.
"""

"""The model room: find the parts of a Hugging Face model, cut, load and run one stage of it.

Knows torch and transformers; knows no sockets, no processes and no plan.
"""

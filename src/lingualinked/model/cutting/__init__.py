"""Finds the parts of a model, cuts it to a span, and joins spans."""

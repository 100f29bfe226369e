"""Loads a model: arguments, description, plan, stages."""

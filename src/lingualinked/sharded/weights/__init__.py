"""Weights of a model that is elsewhere: read, edited and saved."""

"""Profiles that a model is planned by, measured or kept, and what a cluster can do."""

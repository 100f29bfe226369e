"""Hooks, captures and interventions in a stage's forward pass."""

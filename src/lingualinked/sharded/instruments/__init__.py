"""Captures and interventions: what modules compute, collected or changed as data."""

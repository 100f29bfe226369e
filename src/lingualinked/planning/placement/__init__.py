"""The placement problem in numbers, and its solver: programmes, searches and bounds.

Knows arrays of seconds and bytes; no profiles, no models and no processes.
"""

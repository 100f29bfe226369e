"""Weights on a device's disk: copies of the caller's files that are found here, and a cache of what was fetched.

Knows files, folders and byte ranges; neither devices nor what travels between them.
"""

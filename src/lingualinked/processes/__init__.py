"""Worker processes on this machine: starts them, for a caller or for a daemon, sees them end, and ends them.

Knows processes, sockets between them and the operating system's limits; neither messages of a model nor what a worker computes.
"""

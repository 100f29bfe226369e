"""The worker as a process: how it begins, what it may use, how it ends."""

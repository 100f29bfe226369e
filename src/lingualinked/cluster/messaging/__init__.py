"""Requests and their answers: the I/O thread, and who is known to whom."""

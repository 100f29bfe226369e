"""A device's daemon: starts workers here for callers on other hosts that it lets in.

Knows callers, their leases and the processes of their workers; never imports torch, and sees neither weights nor tokens.
"""

"""Hosts and the links between them: found, resolved, relayed, emulated, cut."""

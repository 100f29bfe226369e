"""Workers on other hosts, which the daemons of their devices start.

Knows daemons, and the conversation with them; not what workers do.
"""

"""The ZeroMQ sockets of a mailbox: who may connect, who has, and what wakes them."""

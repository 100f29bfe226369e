"""Messages of bytes and tensors between processes: keys, mailboxes, and the wire format of a message.

Knows no model, no cluster and not what a payload means.
"""

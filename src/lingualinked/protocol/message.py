"""The base of all messages.

Knows how they lie on the wire, not what they say.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages: an array on the wire, its first element names the type."""

"""The base of all messages.

Knows how they lie on the wire, not what they say.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Natural = Annotated[int, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages: an array on the wire, its first element names the type."""

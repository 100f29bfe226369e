"""The base class of all messages.

Knows how messages are encoded, not what they mean.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base class of all messages, encoded as arrays whose first element names the type."""

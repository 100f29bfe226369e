"""The frames of a ZMTP 3 connection, as a listener on the wire can tell them apart.

Knows RFC 23; opens nothing that is encrypted.
"""

from __future__ import annotations

from dataclasses import dataclass

_GREETING_BYTES = 64


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; of a command, its name."""

    is_command: bool
    command: str
    num_bytes: int


def frames_of(stream: bytes) -> list[Frame]:
    """Return the frames of one direction of a connection, from its greeting on; an incomplete one counts."""
    frames = []
    position = _GREETING_BYTES
    while position < len(stream):
        flags = stream[position]
        is_long = bool(flags & 2)
        begin = position + (9 if is_long else 2)
        size = int.from_bytes(stream[position + 1 : begin])
        is_command = bool(flags & 4)
        name_bytes = stream[begin] if is_command and begin < len(stream) else 0
        name = stream[begin + 1 : begin + 1 + name_bytes].decode(errors="replace") if is_command else ""
        frames.append(Frame(is_command, name, size))
        position = begin + size
    return frames

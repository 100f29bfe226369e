"""Several kernels in one call, whose structures stay in memory from one call to the next.

Knows no kernel's arguments but their places.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

from lingualinked.kernels import native

_ADDRESS = struct.Struct("@P")
_CALL = struct.Struct("@2Pl")  # `struct call` of sequence.c
_SEQUENCE = struct.Struct("@Pl")  # its `struct sequence`


class Call(NamedTuple):
    """A kernel's function and its structure; `returns` says whether it returns whether it vouches for its results."""

    name: str
    function: str
    structure: bytes
    returns: bool


def is_available() -> bool:
    """Say whether sequences were compiled."""
    return native.is_available("sequence", frozenset())


class KernelSequence:
    """Kernels that are called one after the other, with structures that may be changed before each call."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._offsets, num_bytes = [], 0
        for each in calls:
            self._offsets.append(num_bytes)
            num_bytes += -(-len(each.structure) // _ADDRESS.size) * _ADDRESS.size
        self._structures = ctypes.create_string_buffer(num_bytes)
        start = ctypes.addressof(self._structures)
        described = b""
        for each, offset in zip(calls, self._offsets, strict=True):
            ctypes.memmove(start + offset, each.structure, len(each.structure))
            described += _CALL.pack(native.function_address(each.name, each.function), start + offset, each.returns)
        self._calls = ctypes.create_string_buffer(described, len(described))
        self._call_all = native.function_of("sequence", "call_all")
        self._sequence = _SEQUENCE.pack(ctypes.addressof(self._calls), len(calls))

    def place(self, number: int, word: int) -> int:
        """Return the place of one of a call's first words, which are addresses or whole numbers."""
        return self._offsets[number] + word * _ADDRESS.size

    def write(self, place: int, *words: int) -> None:
        """Write words from a place on."""
        struct.pack_into(f"@{len(words)}l", self._structures, place, *words)

    def run(self) -> bool:
        """Call the kernels; return whether all vouch for their results."""
        return bool(self._call_all(self._sequence))

"""What is said of hooks between processes: where a pass stops, and what a module was called with. Plain data.

Knows neither torch nor transformers, which the caller imports later.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Positions(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Tokens of a tensor [rows, tokens, ...]: one, several, or a slice of them by its start, stop and step."""

    kind: Literal["one", "several", "slice"]
    values: tuple[int | None, ...]


class Cut(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The part of a call that hooks want, if that is not all of it: its first tensor before the module, or behind it.

    Behind it, they may want what it was called with too. ``positions`` is None for all tokens.
    """

    positions: Positions | None
    with_input: bool = False


class HookPoint(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A module with hooks: whether a pass stops before it, and behind it, whether the hooks may skip it, and what they want.

    ``behind_records`` says that hooks behind it run once transformers has recorded what the module returns.
    """

    path: str
    before: bool
    after: bool
    may_skip: bool = False
    cut_before: Cut | None = None
    cut_after: Cut | None = None
    behind_records: bool = False


class _Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base class of the parts of a structure."""


class TensorAt(_Value, frozen=True, tag=1):
    """The tensor with this index among those of a call."""

    index: int


class ObjectAt(_Value, frozen=True, tag=2):
    """The object with this index among those of a call, which stays in the worker; and what it is."""

    index: int
    type_name: str
    is_cache: bool


class Plain(_Value, frozen=True, tag=3):
    """A value without parts."""

    value: bool | int | float | str | None


class Items(_Value, frozen=True, tag=4):
    """A tuple or a list."""

    is_list: bool
    items: tuple[HookValue, ...]


class Entries(_Value, frozen=True, tag=5):
    """A dictionary, or an output class of transformers, by its name."""

    output_class: str
    keys: tuple[str | int, ...]
    items: tuple[HookValue, ...]


HookValue = TensorAt | ObjectAt | Plain | Items | Entries

Strides = tuple[int, ...] | None
"""Of a tensor whose elements lie one after the other in another order than that of its dimensions."""

"""Converts records to nested plain data, ready for JSON.

Does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


def plain(record: Any) -> dict[str, Any]:
    """Convert a dataclass recursively to dictionaries, tuples, numbers and strings."""
    data: dict[str, Any] = msgspec.to_builtins(record, enc_hook=_as_dict)
    return data


def _as_dict(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not plain data")

"""Logits processors as plain data, as they are sent.

Knows neither their classes nor what they compute.
"""

from __future__ import annotations

from typing import NamedTuple

Number = bool | int | float


class TensorData(NamedTuple):
    """A small tensor: its dtype, its shape and its values, row by row."""

    dtype: str
    shape: tuple[int, ...]
    values: tuple[Number, ...]


class BatchRows(NamedTuple):
    """The rows ``[first, stop)`` of a batch of ``num_rows``, whose tokens are chosen apart from the others."""

    first: int
    stop: int
    num_rows: int


class ProcessorSpec(NamedTuple):
    """A logits processor: the name of its class, and its attributes in the order in which `processors` lists them."""

    kind: str
    values: tuple[Number | TensorData | None, ...]

"""How fast this machine multiplies a few rows with a large weight of each dtype, by which kernel, and how fast it reads memory.

Knows the linear layers of stages; not what is computed with them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lingualinked.model.exact.float_linear import FloatLinear, speed_up_linears
from lingualinked.model.exact.packed_linear import PackedLinear, pack_linears
from lingualinked.model.process.memory import use_huge_pages

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
ROWS = (1, 8)

_WEIGHT_BYTES = 48 << 20  # more than caches hold
_IN_FEATURES = 2048
_MAX_RUNS = 5
_MAX_S = 0.03  # of all runs but the first


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpeed:
    """How a linear layer multiplies some rows, with one thread."""

    dtype: torch.dtype
    num_rows: int
    kernel: str
    bytes_per_s: float  # of the weight


def measure_linears() -> list[LinearSpeed]:
    """Multiply with a large weight of each dtype, with one thread: the quickest of a few runs each."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return [speed for dtype in DTYPES for speed in _measure_dtype(dtype)]
    finally:
        torch.set_num_threads(num_threads)


def measure_memory() -> float:
    """Return the bytes that one thread reads from memory in a second: the quickest of a few runs."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values = torch.ones(_WEIGHT_BYTES // 4)
        use_huge_pages([(values.data_ptr(), values.nbytes)])
        return values.nbytes / _shortest_s(values.sum)
    finally:
        torch.set_num_threads(num_threads)


def _measure_dtype(dtype: torch.dtype) -> list[LinearSpeed]:
    weight = torch.ones(_WEIGHT_BYTES // dtype.itemsize // _IN_FEATURES, _IN_FEATURES, dtype=dtype)
    linear = nn.Linear(_IN_FEATURES, len(weight), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    del weight
    holder = nn.Sequential(linear)
    del linear
    pack_linears(holder)
    speed_up_linears(holder)
    found = []
    for num_rows in ROWS:
        rows = torch.ones(num_rows, _IN_FEATURES, dtype=dtype)
        seconds = _shortest_s(functools.partial(holder, rows))
        kernel = _kernel_name(holder[0], num_rows)
        found.append(LinearSpeed(dtype=dtype, num_rows=num_rows, kernel=kernel, bytes_per_s=_WEIGHT_BYTES / seconds))
    return found


def _kernel_name(layer: nn.Module, num_rows: int) -> str:
    if isinstance(layer, PackedLinear | FloatLinear):
        return layer.kernel_name(num_rows)
    return "torch's own"


def _shortest_s(run: Callable[[], object]) -> float:
    run()  # the first one probes
    seconds: list[float] = []
    while len(seconds) < _MAX_RUNS and sum(seconds) < _MAX_S:
        start_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)

"""A product of few rows with a packed bfloat16 weight, at the speed at which memory gives the weight.

Knows the one layout of weights that oneDNN packs for AVX512-BF16; not whether torch sums in the same order: who calls
compares. `few_rows.c` has the order.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

MAX_ROWS = 16
BLOCK_OUTPUTS = 64
CHUNKS = (512, 1024)
"""Inputs whose products oneDNN adds up before it adds them to the others: for one row, and for several."""

_STORED_INPUTS = 32  # inputs are filled up with zeros to a multiple of it
_NEEDED_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}


class _Product(ctypes.Structure):
    """`struct product` of few_rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("inputs", "weight", "bias", "result")),
        *((name, ctypes.c_long) for name in ("rows", "pairs", "pairs_stored", "outputs", "chunk")),
        ("threads", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("parallel", "thread_number", "num_threads")),
    ]


@functools.cache
def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return _library() is not None and _processor_flags() >= _NEEDED_FLAGS


def is_known_layout(packed: Tensor, in_features: int, out_features: int) -> bool:
    """Say whether a weight that oneDNN packed is as large as in the layout that the kernel reads."""
    stored = _filled(in_features, _STORED_INPUTS) * _filled(out_features, BLOCK_OUTPUTS)
    return num_bytes(packed) == 2 * stored


def num_bytes(packed: Tensor) -> int:
    """Return the size of a packed weight."""
    return int(torch.ops.mkldnn._nbytes(packed))  # noqa: SLF001 - what torch.compile asks


def address(packed: Tensor) -> int:
    """Return where a packed weight lies."""
    return int(torch.ops.mkldnn.data_ptr(packed))


def multiply(rows: Tensor, weight: int, bias: Tensor | None, out_features: int, chunk: int) -> Tensor:
    """Multiply up to `MAX_ROWS` rows ``[M, K]`` with the packed weight at an address, to ``[M, N]``."""
    num_rows, in_features = rows.shape
    rows = functional.pad(rows, (0, 1)) if in_features % 2 else rows.contiguous()
    result = rows.new_empty(num_rows, out_features)
    num_threads = torch.get_num_threads()
    product = _Product(
        rows.data_ptr(),
        weight,
        None if bias is None else bias.data_ptr(),
        result.data_ptr(),
        num_rows,
        rows.shape[1] // 2,
        _filled(in_features, _STORED_INPUTS) // 2,
        out_features,
        chunk // 2,
        num_threads,
        *(_openmp() if num_threads > 1 else ()),
    )
    library = _library()
    assert library is not None
    library.multiply(ctypes.byref(product))
    return result


def _filled(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("libfew_rows.so")
    return ctypes.CDLL(str(path)) if path.exists() else None


@functools.cache
def _processor_flags() -> frozenset[str]:
    """Return the instruction sets that the processor has and the system supports."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))
    except OSError:
        return frozenset()


@functools.cache
def _openmp() -> tuple[int, ...]:
    """Return the entries of the OpenMP library that torch has loaded, whose threads the product shares; none without."""
    for path in {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}:
        library = ctypes.CDLL(path)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        if all(hasattr(library, name) for name in names):
            return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names)
    return ()

"""Gives freed memory back to the system, which an allocator keeps for later.

Knows allocators only.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


def release_memory(accelerator: str = "cpu") -> None:
    """Give back what is not used any more, on the CPU and on an accelerator."""
    gc.collect()
    if accelerator.startswith("cuda"):
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give back the free pages of the C heap; does nothing where there is no such call (it is glibc's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

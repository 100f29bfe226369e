"""Gives freed memory back to the system, which an allocator keeps for later.

Knows allocators only.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

_M_ARENA_MAX = -8  # of malloc.h


def release_memory(accelerator: str = "cpu") -> None:
    """Give back what is not used any more, on the CPU and on an accelerator."""
    gc.collect()
    if accelerator.startswith("cuda"):
        torch.cuda.empty_cache()
    trim_heap()


def use_one_heap() -> None:
    """Have all threads allocate from one heap: what one frees another can use. Does nothing where it is not glibc's."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give back the free pages of the C heap; does nothing where there is no such call (it is glibc's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

"""Returns freed memory to the operating system, which allocators would keep.

Knows allocators only.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

_M_ARENA_MAX = -8  # of malloc.h


def release_memory(accelerator: str = "cpu") -> None:
    """Return unused memory, of the CPU and of an accelerator."""
    gc.collect()
    if accelerator.startswith("cuda"):
        torch.cuda.empty_cache()
    trim_heap()


def use_one_heap() -> None:
    """Make all threads allocate from one heap, so that each can reuse what others free. Does nothing without glibc."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Return the free pages of the C heap. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

"""Returns freed memory to the operating system, which allocators would keep, asks it for larger pages, and limits what is held.

Knows allocators and the kernel's limit; not what memory is for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_M_ARENA_MAX = -8  # of malloc.h
_MADV_COLLAPSE = 25  # of Linux 6.1's mman.h; an older kernel refuses it
_HUGE_PAGE_BYTES = 2 << 20
_MAX_GAP_BYTES = 64 << 10  # between ranges that share a page
_MOST_ON_TOP_BYTES = 256 << 20  # by which what is no part of a model raises the limit, in all
_lifting = threading.RLock()  # by one thread at a time, or one would set the limit while another still needs none


class _OnTop:
    """What is left of the bytes by which the limit may rise."""

    num_left = _MOST_ON_TOP_BYTES


_on_top = _OnTop()


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


def limit_memory(num_bytes: int) -> None:
    """Make Linux's kernel refuse this process private memory beyond a limit."""
    import resource

    # The soft limit alone: a hard one could not be lifted for a while.
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


@contextlib.contextmanager
def limit_lifted() -> Iterator[None]:
    """Lift this process's limit for what is no part of a model; afterwards it is higher by what has been kept of that, up to a bound.

    The bound, since other threads allocate meanwhile, and what was kept may be freed later. Does nothing without a limit.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    with _lifting:
        limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if limit == hard:  # there is none, or it is lifted already
            yield
            return
        before = private_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        try:
            yield
        finally:
            kept = min(max(0, private_bytes() - before), _on_top.num_left)
            _on_top.num_left -= kept
            limit_memory(limit + kept)


def private_bytes() -> int:
    """Return the private writable memory of this process, as ``RLIMIT_DATA`` counts it."""
    with Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData")


def use_huge_pages(ranges: Iterable[tuple[int, int]]) -> None:
    """Put addresses and sizes of memory in use into pages of 2 MiB, where the system can; contents stay.

    A processor that reads weights once per token spends a third of the time on looking up pages of 4 KiB.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    joined: list[list[int]] = []
    for address, num_bytes in sorted(ranges):
        if joined and address - joined[-1][1] <= _MAX_GAP_BYTES:
            joined[-1][1] = address + num_bytes
        else:
            joined.append([address, address + num_bytes])
    for start, end in joined:
        first = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        size = end // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - first
        if size > 0:
            advise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_COLLAPSE)

"""Memory beside which nothing may be read or written: a kernel that does so ends the process.

Knows tensors; nothing of lingualinked.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


class GuardedBuffer:
    """Memory between two pages that nobody may touch; what is placed in it ends, or begins, at one of them."""

    def __init__(self, num_bytes: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        self._size = -(-num_bytes // page) * page
        self._map = mmap.mmap(-1, self._size + 2 * page)
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + page
        self._start = self._size - num_bytes if at_end else 0
        self._num_bytes = num_bytes
        self._all = (ctypes.c_uint8 * self._size).from_address(self._first)
        ctypes.memset(self._first, 0xA5, self._size)
        self.address = self._first + self._start
        for guard in (self._first - page, self._first + self._size):
            self._protect(guard, page, 0)

    def _protect(self, address: int, size: int, protection: int) -> None:
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection) == 0

    def forbid_writing(self) -> None:
        self._protect(self._first, self._size, mmap.PROT_READ)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        memory = (ctypes.c_uint8 * self._num_bytes).from_address(self.address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def is_untouched_around(self) -> bool:
        around = self._all[: self._start] + self._all[self._start + self._num_bytes :]
        return all(each == 0xA5 for each in around)


def guarded_copy(values: Tensor, at_end: bool) -> Tensor:
    """Copy a tensor between pages that nobody may touch, and let nobody write to it."""
    buffer = GuardedBuffer(values.nbytes, at_end)
    copy = buffer.tensor(*values.shape, dtype=values.dtype).copy_(values)
    buffer.forbid_writing()
    copy.buffer = buffer  # type: ignore[attr-defined]  # lives as long
    return copy

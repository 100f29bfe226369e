"""Tensors as the bytes that they consist of.

Knows addresses and memory; no wire format.
"""

from __future__ import annotations

import ctypes

from torch import Tensor


def is_plain(tensor: Tensor) -> bool:
    """Return whether the bytes of a tensor lie in this process's memory as they are sent."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor of at least one element, copying only if necessary."""
    if tensor.requires_grad or not is_plain(tensor):
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return memory_of(tensor)


def copy_bytes(tensor: Tensor, num_bytes: int) -> bytes:
    """Return a copy of the bytes of a tensor, which are so many; for few of them, this is quicker than a view."""
    if not num_bytes:
        return b""
    if not is_plain(tensor):
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(tensor.data_ptr(), num_bytes)


def memory_of(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor of at least one element as bytes; the view keeps the tensor alive."""
    # By address: going through NumPy and a byte view takes several times as long, and each hop does this three times.
    memory = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # a ctypes array accepts attributes; this one keeps the tensor alive
    return memoryview(memory).cast("B")

"""How a tensor lies in memory, which products depend on in their last bits, kept while it travels.

Knows tensors; neither messages nor what a tensor is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hooks.hook_data import Strides

_MOST_ROOM = 8
"""How many times the room of its elements a tensor with gaps between them may take."""


def pack_tensor(tensor: Tensor) -> tuple[Tensor, Strides]:
    """Return a tensor as it is sent, contiguous, and its strides if they differ from that (see `_with_room`)."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor, None
    return tensor.contiguous(), _with_room(_without_repeats(tensor, tensor.stride()).shape, tensor.stride())


def unpack_tensor(tensor: Tensor, strides: Strides) -> Tensor:
    """Return a tensor with the strides that it had before it was sent; raise ProtocolError if it can't have had them."""
    if strides is None:
        return tensor
    is_possible = len(strides) == tensor.ndim and min(strides, default=0) >= 0
    once = _without_repeats(tensor, strides) if is_possible else tensor
    if not is_possible or _with_room(once.shape, strides) != strides:
        raise ProtocolError(f"a tensor of shape {list(tensor.shape)} can't have the strides {list(strides)}")
    own = torch.empty_strided(once.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(once)
    return own.expand(tensor.shape)


def _with_room(shape: Sequence[int], strides: tuple[int, ...]) -> Strides:
    """Return strides, with smaller gaps if they take too much room, or None if elements overlap.

    The same dimensions can be viewed as one, which is what mostly decides how a product is computed.
    """
    smaller, room, small_room = list(strides), 1, 1
    end, small_end = 1, 1  # with the gap behind the last element
    for dimension in sorted(range(len(strides)), key=strides.__getitem__):
        size, stride = shape[dimension], strides[dimension]
        if size > 1:
            if stride < room:
                return None
            small = smaller[dimension] = small_end if stride == end else min(stride, 2 * small_room)
            end, small_end = size * stride, size * small
            room, small_room = room + (size - 1) * stride, small_room + (size - 1) * small
    most = _MOST_ROOM * math.prod(shape)
    return strides if room <= most else tuple(smaller) if small_room <= most else None


def _without_repeats(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a tensor with one item of each dimension whose stride is 0, along which an expanded tensor repeats itself."""
    for dimension, stride in enumerate(strides):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))
    return tensor

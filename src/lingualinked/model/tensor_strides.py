"""How a tensor lies in memory, which products depend on in their last bits, kept while it travels.

Knows tensors; neither messages nor what a tensor is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hook_data import Strides


def pack_tensor(tensor: Tensor) -> tuple[Tensor, Strides]:
    """Return a tensor as it is sent, contiguous, and its strides if they differ from that."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor, None
    once = _without_repeats(tensor, tensor.stride())
    is_dense = torch.empty_like(once, device="meta").stride() == once.stride()
    return tensor.contiguous(), tensor.stride() if is_dense else None


def unpack_tensor(tensor: Tensor, strides: Strides) -> Tensor:
    """Return a tensor with the strides that it had before it was sent; raise ProtocolError if it can't have had them."""
    if strides is None:
        return tensor
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=False))
    if len(strides) != tensor.ndim or min(strides, default=0) < 0 or reach >= tensor.numel():
        raise ProtocolError(f"a tensor of shape {list(tensor.shape)} can't have the strides {list(strides)}")
    once = _without_repeats(tensor, strides)
    own = torch.empty_strided(once.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(once)
    return own.expand(tensor.shape)


def _without_repeats(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a tensor with one item of each dimension whose stride is 0, along which an expanded tensor repeats itself."""
    for dimension, stride in enumerate(strides):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))
    return tensor

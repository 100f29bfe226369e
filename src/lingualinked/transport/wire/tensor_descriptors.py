"""What a message says of each of its tensors, in numbers: the dtype and the shape; and memory for a tensor like that.

Knows tensors and what can be sent of them; neither frames nor limits on bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.quantities import count_text
from lingualinked.transport.wire.message_limits import MAX_NUM_DIMS, MIN_SHARED_BYTES

# The code of a dtype is its position, so only append. Bytes are in the machine's order: every machine that runs torch is
# little-endian.
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
ITEM_SIZES = tuple(dtype.itemsize for dtype in DTYPES)

Natural = Annotated[int, msgspec.Meta(ge=0)]
Descriptor = Annotated[list[Natural], msgspec.Meta(min_length=1, max_length=1 + MAX_NUM_DIMS)]


def describe_tensor(tensor: Tensor) -> list[int]:
    """Return the dtype code and the shape of a tensor, or refuse to send it."""
    code = _CODES.get(tensor.dtype)
    if code is None:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ProtocolError(f"a tensor of dtype {tensor.dtype} can't be sent: convert it to one of {known}")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "without data (on the meta device)" if tensor.is_meta else f"of layout {tensor.layout}"
        raise ProtocolError(f"a tensor {kind} can't be sent: pass a dense one that holds data")
    if tensor.dim() > MAX_NUM_DIMS:
        raise ProtocolError(
            f"a tensor of {count_text(tensor.dim(), 'dimension')} can't be sent: the limit is {MAX_NUM_DIMS}"
        )
    return [code, *tensor.shape]


def num_bytes_at_least(shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of a shape with zeros counted as 1, which bounds each dimension of an empty tensor too."""
    return itemsize * math.prod(max(dim, 1) for dim in shape)


def allocate_tensor(descriptor: list[int], *, is_pinned: bool = False) -> Tensor:
    """Return memory for the tensor that a descriptor announces; pinned if there is any."""
    code, *shape = descriptor
    if is_pinned:
        with contextlib.suppress(RuntimeError):  # none is left, or the device has failed, which a step must be told of
            return torch.empty(shape, dtype=DTYPES[code], pin_memory=True)
    return torch.empty(shape, dtype=DTYPES[code])


class SpareTensor:
    """Memory for one more small tensor like the last one, made while nothing has come: that takes as long as the rest of decoding."""

    def __init__(self) -> None:
        self._last: list[int] = []  # its descriptor
        self._tensor: Tensor | None = None

    def prepare(self) -> None:
        """Make the next one, if it was used."""
        if self._tensor is None and self._last:
            with contextlib.suppress(RuntimeError, MemoryError):  # the message that needs it meets the lack by itself
                self._tensor = allocate_tensor(self._last)

    def pop(self, descriptor: list[int], num_bytes: int) -> Tensor:
        """Return memory for a tensor of so many bytes, which nothing else uses."""
        tensor = self._tensor if descriptor == self._last else None
        is_small = num_bytes < MIN_SHARED_BYTES  # a sender may disregard that
        self._last, self._tensor = descriptor if is_small else [], None
        return allocate_tensor(descriptor) if tensor is None else tensor

"""Linear layers whose weight lies in the order in which the processor's matrix kernel reads it.

On a CPU, torch hands a bfloat16 product to oneDNN, which copies the weight into that order at every call; for a few rows
the copy takes longer than the product. Knows nothing of models or stages.
"""

from __future__ import annotations

import collections
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.model.memory import trim_heap

_PROBED_ELEMENTS = 1 << 21  # of a weight that is probed in its full size; a larger one is probed with fewer outputs
_TRIM_BYTES = 8 << 20
_PROBE_OUTPUTS = 64  # different ones; the others repeat them


class PackedLinear(nn.Module):
    """Gives the bits of an `nn.Linear`, from a packed copy of its weight that takes the weight's place.

    For each number of rows it is found out once per process whether the product with the packed weight rounds in the
    same order (`_is_exact`); where it does not, the weight is unpacked for the call.

    Parameters
    ----------
    linear : nn.Linear
        On the CPU, in bfloat16; not used any more.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # No buffer: what walks over those copies, converts and compares, and this is opaque.
        self._packed = _pack(linear.weight.detach())

    def forward(self, states: Tensor) -> Tensor:
        """Multiply ``[..., in features]`` to ``[..., out features]``."""
        # What does not lie in one piece torch multiplies in another way: a bias is then added to a product that has
        # been rounded, and several rows of each batch go to a batched kernel.
        if states.is_contiguous() or (self.bias is None and states.shape[-2] == 1):
            rows = states.reshape(-1, self.in_features)
            if _is_exact(*_shape(self, len(rows))):
                return _multiply(rows, self._packed, self.bias).view(*states.shape[:-1], self.out_features)
        return functional.linear(states, self.weight(), self.bias)

    def weight(self) -> Tensor:
        """Unpack the weight, ``[out features, in features]``."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def plain(self) -> nn.Linear:
        """Give a linear layer with this one's bias, whose weight is still to be set."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.bias = self.bias
        return linear.eval()


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a model by packed ones, in place, where that changes no bit and holds nothing twice.

    Parameters
    ----------
    model : nn.Module
        On the CPU.
    """
    counts = collections.Counter(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    num_unpacked_bytes = 0
    for name in names:  # by name: a list of the layers would keep all plain weights to the end
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.weight.dtype is torch.bfloat16 and counts[id(linear.weight)] == 1 and _is_exact(*_shape(linear, 1)):
            model.set_submodule(name, PackedLinear(linear))
            num_unpacked_bytes += linear.weight.nbytes
            del linear
            if (
                num_unpacked_bytes >= _TRIM_BYTES
            ):  # the heap would keep the plain weights' place, and take more for packed ones
                trim_heap()
                num_unpacked_bytes = 0


def _shape(layer: nn.Linear | PackedLinear, num_rows: int) -> tuple[int, int, int, bool, int]:
    return num_rows, layer.in_features, layer.out_features, layer.bias is not None, torch.get_num_threads()


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # noqa: SLF001 - what torch.compile uses
    return packed


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")  # noqa: SLF001
    return product


@functools.cache
def _is_exact(num_rows: int, in_features: int, out_features: int, has_bias: bool, num_threads: int) -> bool:  # noqa: ARG001 - the kernel that torch chooses depends on it
    """Find out whether a product with a packed weight has the bits of the plain one, in these shapes.

    The inputs are such that any other order of summation shows in nearly every output: each large term is taken back
    by an equal one at a random place, and what is left are the rounding errors on the way.
    """
    generator = torch.Generator().manual_seed(0)
    half = in_features // 2
    back = torch.randperm(half, generator=generator)
    values = torch.randn((num_rows + _PROBE_OUTPUTS, half), generator=generator)
    inputs, outputs = values[:num_rows], values[num_rows:]
    rest = torch.full((1,), 2.0**-14).expand(in_features - 2 * half)
    rows = torch.cat([inputs, -inputs[:, back], rest.expand(num_rows, -1)], dim=1).bfloat16()
    block = torch.cat([outputs, outputs[:, back], rest.expand(_PROBE_OUTPUTS, -1)], dim=1).bfloat16()
    num_outputs = min(out_features, max(_PROBE_OUTPUTS, _PROBED_ELEMENTS // in_features))
    weight = block.repeat(-(-num_outputs // _PROBE_OUTPUTS), 1)[:num_outputs]
    bias = 2.0**-14 * torch.randn(num_outputs, generator=generator).bfloat16() if has_bias else None
    try:
        with torch.inference_mode():
            return torch.equal(functional.linear(rows, weight, bias), _multiply(rows, _pack(weight), bias))
    except (AttributeError, RuntimeError):  # this build of torch, or this processor, has no such kernel
        return False

"""Linear layers whose weight is stored in the order in which the processor's matrix kernel reads it.

On a CPU, torch computes a bfloat16 product with oneDNN, which copies the weight into that order at every call; for a few
rows the copy takes longer than the product. Few rows have a kernel of their own, which reads the same packed weight as
fast as memory gives it. Knows no models and no stages.
"""

from __future__ import annotations

import collections
import ctypes
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.kernels import few_rows
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.exact.product_probe import Kernel, Shape, find_exact_kernel
from lingualinked.model.exact.rows_alone import count_rows
from lingualinked.model.process.memory import trim_heap, use_huge_pages

_TRIM_BYTES = 8 << 20


class PackedLinear(nn.Module):
    """Computes exactly what an `nn.Linear` on the CPU in bfloat16 computes, with a packed weight in place of its own.

    For each number of rows, a probe decides which product with the packed weight rounds in the same order; if none does, the
    weight is unpacked for the call.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.has_bias = linear.bias is not None  # asking for a parameter takes a microsecond
        self.repack(linear.weight.detach())

    def forward(self, states: Tensor) -> Tensor:
        """Multiply ``[..., in features]`` to ``[..., out features]``."""
        if (
            states.dtype is not torch.bfloat16
            or torch.is_autocast_enabled("cpu")
            or torch.is_grad_enabled()
            or not torch._C._get_mkldnn_enabled()  # noqa: SLF001
        ):
            return functional.linear(states, self.unpacked(), self.bias)
        # torch multiplies non-contiguous inputs differently: it adds the bias to a rounded product, and uses a batched
        # kernel for several rows of each batch.
        shape = states.shape
        if shape[-1] == self.in_features and (states.is_contiguous() or (not self.has_bias and shape[-2] == 1)):
            kernel = _exact_kernel(*_shape(self, count_rows(states.numel() // self.in_features)))
            if kernel is not None:
                return kernel(self, states)
        return functional.linear(states, self.unpacked(), self.bias)

    def repack(self, weight: Tensor) -> None:
        """Use another weight from now on, bfloat16 ``[out features, in features]``."""
        # Not a buffer: code that walks over buffers copies, converts and compares them, and this tensor is opaque.
        self.packed = _pack(weight)
        self.address = few_rows.address(self.packed)

    @property
    def weight(self) -> Tensor:
        """The weight's shape and dtype, which some models ask for; it has no values, so that nothing computes with it."""
        return torch.empty(self.out_features, self.in_features, dtype=torch.bfloat16, device="meta")

    def unpacked(self) -> Tensor:
        """Return the unpacked weight, ``[out features, in features]``."""
        weight: Tensor = self.packed.to_dense()
        return weight

    @property
    def keeps_rows_apart(self) -> bool:
        """Whether one row's kernel gives each of several rows the bits that it has alone: few_rows.c does (`rows_alone`)."""
        kernel = _exact_kernel(*_shape(self, 1))
        return kernel is not None and kernel is not _multiply_packed

    def kernel_name(self, num_rows: int) -> str:
        """Say what computes the product of this many rows."""
        kernel = _exact_kernel(*_shape(self, num_rows))
        if kernel is None:
            return "torch's own, with the weight unpacked"
        return "oneDNN's, with the weight packed" if kernel is _multiply_packed else "few_rows.c"

    def plain(self) -> nn.Linear:
        """Return a linear layer with the same bias, and a weight that is still to be set."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.bias = self.bias
        return linear.eval()


def pack_linears(model: nn.Module, without: Iterable[str] = ()) -> None:
    """Replace linear layers of a CPU model by packed ones, in place, where that is exact and holds no weight twice.

    The modules of these paths, and what is in them, stay as they are.
    """
    counts = collections.Counter(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    kept = tuple(f"{path}." for path in without)
    names = [
        name for name, module in model.named_modules() if type(module) is nn.Linear and not f"{name}.".startswith(kept)
    ]
    num_replaced_bytes, layers = 0, []
    for name in names:  # by name: a list of layers would keep all plain weights alive
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if (
            linear.weight.dtype is torch.bfloat16
            and counts[id(linear.weight)] == 1
            and (linear.bias is None or (linear.bias.dtype is torch.bfloat16 and linear.bias.is_contiguous()))
            and _exact_kernel(*_shape(linear, 1))
        ):
            layer = PackedLinear(linear)
            model.set_submodule(name, layer)
            layers.append(layer)
            num_replaced_bytes += linear.weight.nbytes
            del linear
            if num_replaced_bytes >= _TRIM_BYTES:  # the heap would keep the memory of the plain weights
                trim_heap()
                num_replaced_bytes = 0
    use_huge_pages((layer.address, few_rows.num_bytes(layer.packed)) for layer in layers)


def _shape(layer: nn.Linear | PackedLinear, num_rows: int) -> tuple[torch.dtype, int, int, int, bool, int]:
    has_bias = layer.has_bias if isinstance(layer, PackedLinear) else layer.bias is not None
    return torch.bfloat16, num_rows, layer.in_features, layer.out_features, has_bias, torch.get_num_threads()


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # noqa: SLF001 - what torch.compile uses
    return packed


def _multiply_packed(layer: PackedLinear, states: Tensor) -> Tensor:
    rows = states.reshape(-1, layer.in_features)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, layer.packed, layer.bias, "none", [], "")  # noqa: SLF001
    return product.view(*states.shape[:-1], layer.out_features)


def _multiply_few(layer: PackedLinear, states: Tensor, *, chunk: int) -> Tensor:
    bias = layer.bias if layer.has_bias else None
    return few_rows.multiply(states, layer.address, bias, layer.out_features, chunk)


def few_rows_chunk(layer: PackedLinear, num_rows: int) -> int | None:
    """Return how many inputs `few_rows` adds up at once where it multiplies so many rows; None if it does not."""
    kernel = _exact_kernel(*_shape(layer, num_rows))
    is_few = isinstance(kernel, functools.partial) and kernel.func is _multiply_few and layer.in_features % 2 == 0
    return kernel.keywords["chunk"] if is_few else None  # type: ignore[union-attr]


def _kernels(num_rows: int) -> dict[str, Kernel]:
    """Return the products of so many rows with a packed weight, the quickest first."""
    few = few_rows.CHUNKS if few_rows.is_available() and num_rows <= few_rows.MAX_ROWS else ()
    return {f"few_rows.c {chunk}": functools.partial(_multiply_few, chunk=chunk) for chunk in few} | {
        "oneDNN": _multiply_packed
    }


def _kernels_for(layer: PackedLinear, rows: Tensor) -> dict[str, Kernel]:
    if not _is_packed(layer):  # other layers do as well, and have torch's own product without unpacking anything
        return {}
    kernels = _kernels(len(rows))
    if few_rows.is_known_layout(layer.packed, layer.in_features, layer.out_features):
        return kernels
    return {"oneDNN": kernels["oneDNN"]}


def _is_packed(layer: PackedLinear) -> bool:
    """Say whether oneDNN has put the weight into another order: without BF16 instructions, it leaves it as it is."""
    weight = layer.unpacked()[:2]
    memory = (ctypes.c_uint8 * weight.nbytes).from_address(layer.address)
    return not torch.equal(torch.frombuffer(memory, dtype=weight.dtype).view_as(weight), weight)


@keep_result(str)
def _packed_kernel(*shape: Any) -> str | None:
    return find_exact_kernel(Shape(*shape), PackedLinear, _kernels_for)


@functools.cache
def _exact_kernel(*shape: Any) -> Kernel | None:
    """Return the quickest product with a packed weight that is bit-equal to the plain one in this `Shape`, or None."""
    if Shape(*shape).is_small:
        return None
    return _kernels(Shape(*shape).num_rows).get(_packed_kernel(*shape) or "")

"""Linear layers whose weight is stored in the order in which the processor's matrix kernel reads it.

On a CPU, torch computes a bfloat16 product with oneDNN, which copies the weight into that order at every call; for a few
rows the copy takes longer than the product. Few rows have a kernel of their own, which reads the same packed weight as
fast as memory gives it. Knows no models and no stages.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.kernels import few_rows
from lingualinked.model.memory import trim_heap, use_huge_pages

# Of a weight; torch multiplies smaller ones itself, in another order, and packing gains nothing.
_MIN_ELEMENTS = 1 << 13
_PROBED_ELEMENTS = 1 << 20  # of a weight that is probed at full size; a larger one is probed with fewer outputs
_BLOCK_OUTPUTS = 64
_NUM_DISTINCT = 64  # rows and outputs of a probe; the others repeat them
_TINY = 2.0**-130  # not a normal value: some instructions take it for zero
_TRIM_BYTES = 8 << 20


Kernel = Callable[["PackedLinear", Tensor], Tensor]
"""From a layer and contiguous rows ``[M, in features]`` to their product ``[M, out features]``."""


class PackedLinear(nn.Module):
    """Computes exactly what an `nn.Linear` on the CPU in bfloat16 computes, with a packed weight in place of its own.

    For each number of rows, a probe (`_exact_kernel`), made once per process, decides which product with the packed weight
    rounds in the same order; if none does, the weight is unpacked for the call.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Not a buffer: code that walks over buffers copies, converts and compares them, and this tensor is opaque.
        self.packed = _pack(linear.weight.detach())
        self.address = few_rows.address(self.packed)

    def forward(self, states: Tensor) -> Tensor:
        """Multiply ``[..., in features]`` to ``[..., out features]``."""
        if states.dtype is not torch.bfloat16 or torch.is_autocast_enabled("cpu") or not torch._C._get_mkldnn_enabled():  # noqa: SLF001
            return functional.linear(states, self.weight(), self.bias)
        # torch multiplies non-contiguous inputs differently: it adds the bias to a rounded product, and uses a batched
        # kernel for several rows of each batch.
        if states.is_contiguous() or (self.bias is None and states.shape[-2] == 1):
            rows = states.reshape(-1, self.in_features)
            kernel = _exact_kernel(*_shape(self, rows.shape[0]))  # len() would be slow
            if kernel is not None:
                return kernel(self, rows).view(*states.shape[:-1], self.out_features)
        return functional.linear(states, self.weight(), self.bias)

    def weight(self) -> Tensor:
        """Return the unpacked weight, ``[out features, in features]``."""
        weight: Tensor = self.packed.to_dense()
        return weight

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


def pack_linears(model: nn.Module) -> None:
    """Replace linear layers of a CPU model by packed ones, in place, where that is exact and holds no weight twice."""
    counts = collections.Counter(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
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


def _shape(layer: nn.Linear | PackedLinear, num_rows: int) -> tuple[int, int, int, bool, int]:
    return num_rows, layer.in_features, layer.out_features, layer.bias is not None, torch.get_num_threads()


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # noqa: SLF001 - what torch.compile uses
    return packed


def _multiply_packed(layer: PackedLinear, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, layer.packed, layer.bias, "none", [], "")  # noqa: SLF001
    return product


def _multiply_few(layer: PackedLinear, rows: Tensor, *, chunk: int) -> Tensor:
    return few_rows.multiply(rows, layer.address, layer.bias, layer.out_features, chunk)


@functools.cache
def _exact_kernel(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    num_threads: int,
) -> Kernel | None:
    """Probe which product with a packed weight is bit-equal to the plain one, in these shapes: the quickest, or none.

    A large weight is probed with fewer outputs, with the same remainder modulo the block size of the kernels: with at
    least a block for each thread, since oneDNN shares out the inputs among threads that would have no outputs.
    """
    if in_features * out_features < _MIN_ELEMENTS:
        return None
    generator = torch.Generator().manual_seed(0)
    kernels: list[Kernel] = [_multiply_packed]
    if few_rows.is_available() and num_rows <= few_rows.MAX_ROWS:
        kernels = [*(functools.partial(_multiply_few, chunk=chunk) for chunk in few_rows.CHUNKS), *kernels]
    try:
        with torch.inference_mode():
            for make, num_elements in (
                (cancelling_product, _PROBED_ELEMENTS),
                (absorbing_product, 2 * _MIN_ELEMENTS),
                (tied_product, 2 * _MIN_ELEMENTS),
            ):
                num_blocks = max(num_threads, num_elements // in_features // _BLOCK_OUTPUTS)
                num_outputs = min(out_features, num_blocks * _BLOCK_OUTPUTS + out_features % _BLOCK_OUTPUTS)
                rows, weight, bias = make(num_rows, in_features, num_outputs, has_bias, generator)
                expected = functional.linear(rows, weight, bias)
                layer = PackedLinear(_linear(weight, bias))
                if not few_rows.is_known_layout(layer.packed, in_features, num_outputs):
                    kernels = kernels[-1:]
                kernels = [kernel for kernel in kernels if _have_equal_bits(kernel(layer, rows), expected)]
        return kernels[0] if kernels else None
    except (AttributeError, RuntimeError):  # this build of torch, or this processor, has no such kernel
        return None


def _have_equal_bits(result: Tensor, expected: Tensor) -> bool:
    return torch.equal(result.view(torch.int16), expected.view(torch.int16))  # 0 and -0 are two values


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


Product = tuple[Tensor, Tensor, Tensor | None]
"""Inputs [rows, in features], weight [out features, in features] and bias [out features] of a layer."""


def cancelling_product(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
) -> Product:
    """Make a product in which any other order of summation changes nearly every output.

    Each term, including the bias, is cancelled by an equal one at a random place, so that only rounding errors remain.
    The terms have many magnitudes, so that there are such errors.
    """
    num_pairs = (in_features - has_bias) // 2
    back = torch.randperm(num_pairs, generator=generator)
    magnitudes = 2.0 ** torch.randint(-6, 7, (num_pairs,), generator=generator)
    inputs = magnitudes * torch.randn((min(num_rows, _NUM_DISTINCT), num_pairs), generator=generator)
    weights = torch.randn((min(out_features, _NUM_DISTINCT), num_pairs), generator=generator)
    bias = torch.randn(len(weights), generator=generator).to(dtype) if has_bias else None
    rest = torch.full((1, in_features - has_bias - 2 * num_pairs), 2.0**-14)
    rows = [inputs, -inputs[:, back], rest.expand(len(inputs), -1)]
    columns = [weights, weights[:, back], rest.expand(len(weights), -1)]
    if bias is not None:
        rows.append(torch.ones(len(inputs), 1))
        columns.append(-bias[:, None].float())
    places = torch.randperm(in_features, generator=generator)
    weight = torch.cat(columns, dim=1)[:, places]
    return _repeat_distinct(num_rows, out_features, torch.cat(rows, dim=1)[:, places], weight, bias, dtype)


def absorbing_product(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
) -> Product:
    """Make a product in which a large term absorbs all that is added before its opposite cancels it.

    So an output is the sum of what comes after the two. They lie near the end, near the beginning, or anywhere: a
    cancelling product says little about a short last chunk.
    """
    num_distinct = min(out_features, _NUM_DISTINCT)
    outputs = torch.arange(num_distinct)
    large, opposite = torch.randint(in_features, (2, num_distinct), generator=generator)
    opposite[0::3] = (-1 - outputs[0::3] // 3 % 8) % in_features
    large[1::3], opposite[1::3] = 0, (1 + outputs[1::3] // 3) % in_features
    rows = 2.0 ** torch.randint(-3, 4, (min(num_rows, _NUM_DISTINCT), 1), generator=generator)
    weight = torch.randn((num_distinct, in_features), generator=generator)
    weight[outputs, large] = 2.0**40
    weight[outputs, opposite] = -(2.0**40)
    bias = torch.randn(num_distinct, generator=generator) if has_bias else None
    return _repeat_distinct(num_rows, out_features, rows.expand(-1, in_features), weight, bias, dtype)


def tied_product(
    num_rows: int, in_features: int, out_features: int, has_bias: bool, generator: torch.Generator
) -> Product:
    """Make a product of small numbers that is exact in any order, and then rounded once, from halfway between two values.

    Results are odd, and near 384 or -384: from 256 to 512, bfloat16 has the even numbers. One term is far smaller, or zero:
    results a little above or below halfway show who rounds twice. Some outputs have weights that are not normal values.
    """
    largest = max(1, round(10 / in_features**0.25))
    rows, weight = (
        torch.randint(-largest, largest + 1, (min(number, _NUM_DISTINCT), in_features), generator=generator).float()
        for number in (num_rows, out_features)
    )
    rows *= 2
    for place, (row, column) in enumerate(((16, 24), (1, 1), (2**-6, 2**-6))):
        rows[:, place : place + 1] = row
        weight[:, place : place + 1] = column
    weight[:, 2:3] *= torch.randint(-1, 2, (len(weight), 1), generator=generator)
    weight *= 2 * torch.randint(0, 2, (len(weight), 1), generator=generator) - 1
    bias = 2 * torch.randint(-32, 33, (len(weight),), generator=generator).float() if has_bias else None
    weight[5::8] *= _TINY
    if bias is not None:
        bias[5::8] *= _TINY
    return _repeat_distinct(num_rows, out_features, rows, weight, bias)


def _repeat_distinct(
    num_rows: int,
    out_features: int,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> Product:
    outputs = torch.arange(out_features)
    outputs = (outputs + outputs // _BLOCK_OUTPUTS) % len(weight)  # no two blocks are equal: an exchange is seen
    return (
        rows.to(dtype)[torch.arange(num_rows) % len(rows)],
        weight.to(dtype)[outputs],
        None if bias is None else bias.to(dtype)[outputs],
    )

"""Linear layers whose products of few rows read the weight once, in the order in which torch stores it.

The weight stays as it is, so that other products are torch's own: for float32, for float16 and bfloat16 where torch
computes dot products, and for bfloat16 where oneDNN does without BF16 instructions. Knows no models and no stages.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, backends, nn
from torch.nn import functional

from lingualinked.kernels import bfloat_rows, float_rows, half_rows
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.exact.product_probe import Kernel, Shape, find_exact_kernel
from lingualinked.model.process.memory import use_huge_pages

_MAX_ROWS = max(float_rows.MAX_ROWS, half_rows.MAX_ROWS, bfloat_rows.MAX_ROWS)
_TRIED_ROWS = (1, 4)  # summed in two orders, of which one may be known


class FloatLinear(nn.Linear):
    """Computes exactly what an `nn.Linear` on the CPU computes, from the same weight.

    For each number of rows, a probe finds a kernel that sums in torch's order; if there is none, the product is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Multiply ``[..., in features]`` to ``[..., out features]``."""
        num_rows = input.numel() // max(self.in_features, 1)
        if 0 < num_rows <= _MAX_ROWS and self._is_plain(input):
            rows = input.reshape(num_rows, self.in_features)
            kernel = _exact_kernel(*_shape(self, num_rows))
            if kernel is not None and _accepts(rows, self.weight):
                return kernel(self, rows).view(*input.shape[:-1], self.out_features)
        return functional.linear(input, self.weight, self.bias)

    def kernel_name(self, num_rows: int) -> str:
        """Say what computes the product of this many rows."""
        kernel = _exact_kernel(*_shape(self, num_rows)) if num_rows <= _MAX_ROWS else None
        if kernel is None:
            return "torch's own"
        names: dict[Kernel, str] = {_multiply_half: "half_rows.c", _multiply_bfloat: "bfloat_rows.c"}
        return names.get(kernel, "float_rows.c")

    def _is_plain(self, states: Tensor) -> bool:
        """Say whether torch multiplies these states as one matrix, with the kernels of its default settings."""
        tensors = [states, self.weight] if self.bias is None else [states, self.weight, self.bias]
        return bool(
            all(type(each) in (Tensor, nn.Parameter) and each.dtype is states.dtype for each in tensors)
            and all(each.is_contiguous() and each.device.type == "cpu" for each in tensors)
            and states.dim() > 1
            and states.shape[-1] == self.in_features
            and self.weight.shape == (self.out_features, self.in_features)
            and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
            and not torch.is_autocast_enabled("cpu")
            and torch._C._get_mkldnn_enabled()  # noqa: SLF001 - no public getter
            and not torch._C._get_cpu_allow_fp16_reduced_precision_reduction()  # type: ignore[attr-defined] # noqa: SLF001
            and backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
        )


def speed_up_linears(model: nn.Module, without: Iterable[str] = ()) -> None:
    """Replace linear layers of a CPU model by ones with the same parameters, where products of few rows gain by it.

    The modules of these paths, and what is in them, stay as they are.
    """
    kept = tuple(f"{path}." for path in without)
    layers = []
    for name, linear in list(model.named_modules()):
        if f"{name}.".startswith(kept) or type(linear) is not nn.Linear:
            continue
        if any(_exact_kernel(*_shape(linear, num_rows)) for num_rows in _TRIED_ROWS):
            layer = FloatLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            layer.weight, layer.bias = linear.weight, linear.bias
            layer.train(linear.training)
            model.set_submodule(name, layer)
            layers.append(layer)
    use_huge_pages((layer.weight.data_ptr(), layer.weight.nbytes) for layer in layers)


def _shape(layer: nn.Linear, num_rows: int) -> tuple[torch.dtype, int, int, int, bool, int]:
    has_bias = layer.bias is not None
    return layer.weight.dtype, num_rows, layer.in_features, layer.out_features, has_bias, torch.get_num_threads()


def _accepts(rows: Tensor, weight: Tensor) -> bool:
    return rows.dtype is not torch.float32 or float_rows.accepts(rows, weight)


def _kernels(shape: Shape) -> dict[str, Kernel]:
    """Return the products that may have torch's order, by name."""
    dtype, num_rows, in_features, out_features, _, _ = shape
    kernels: dict[str, Kernel] = {}
    if dtype is torch.float32 and float_rows.is_available() and num_rows <= float_rows.MAX_ROWS:
        for order in float_rows.known_orders(num_rows):
            kernels[f"float_rows.c {order}"] = functools.partial(_multiply_float, order=order)
    if (
        dtype in (torch.float16, torch.bfloat16)
        and half_rows.is_available()
        and half_rows.accepts(num_rows, in_features)
    ):
        kernels["half_rows.c"] = _multiply_half
    is_known_size = bfloat_rows.accepts(num_rows, in_features, out_features)
    if dtype is torch.bfloat16 and bfloat_rows.is_available() and is_known_size:
        kernels["bfloat_rows.c"] = _multiply_bfloat
    return kernels


def _multiply_float(layer: nn.Linear, rows: Tensor, *, order: float_rows.Order) -> Tensor:
    return float_rows.multiply(rows, layer.weight, layer.bias, order)


def _multiply_half(layer: nn.Linear, rows: Tensor) -> Tensor:
    return half_rows.multiply(rows, layer.weight, layer.bias)


def _multiply_bfloat(layer: nn.Linear, rows: Tensor) -> Tensor:
    return bfloat_rows.multiply(rows, layer.weight.data_ptr(), layer.bias, layer.out_features)


def _kernels_for(layer: nn.Linear, rows: Tensor) -> dict[str, Kernel]:
    return _kernels(Shape(*_shape(layer, len(rows)))) if _accepts(rows, layer.weight) else {}


@keep_result(str)
def _float_kernel(*shape: Any) -> str | None:
    return find_exact_kernel(Shape(*shape), nn.Module.eval, _kernels_for)


@functools.cache
def _exact_kernel(*shape: Any) -> Kernel | None:
    """Return the first kernel that is bit-equal to torch's product in this `Shape`, or None."""
    known = {} if Shape(*shape).is_small else _kernels(Shape(*shape))
    return known.get(_float_kernel(*shape) or "") if known else None

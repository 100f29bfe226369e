"""Linear layers whose products of few rows read the weight once, in the order in which torch stores it.

The weight stays as it is, so that other products are torch's own: for float32, and for float16 and bfloat16 where torch
computes dot products. Knows no models and no stages.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, backends, nn
from torch.nn import functional

from lingualinked.kernels import float_rows, half_rows
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.exact.product_probe import Kernel, Shape, find_exact_kernel
from lingualinked.model.memory import use_huge_pages

_MAX_ROWS = max(float_rows.MAX_ROWS, half_rows.MAX_ROWS)
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
        if num_rows > _MAX_ROWS or _exact_kernel(*_shape(self, num_rows)) is None:
            return "torch's own"
        return "float_rows.c" if self.weight.dtype is torch.float32 else "half_rows.c"

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


def speed_up_linears(model: nn.Module) -> None:
    """Replace linear layers of a CPU model by ones with the same parameters, where products of few rows gain by it."""
    layers = []
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and any(_exact_kernel(*_shape(linear, num_rows)) for num_rows in _TRIED_ROWS):
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
    return float_rows.accepts(rows, weight) if rows.dtype is torch.float32 else half_rows.accepts(rows, weight)


def _kernels(dtype: torch.dtype, num_rows: int) -> dict[str, Kernel]:
    """Return the products of so many rows that may have torch's order, by name."""
    if dtype is torch.float32 and float_rows.is_available() and num_rows <= float_rows.MAX_ROWS:
        orders = float_rows.known_orders(num_rows)
        return {f"float_rows.c {order}": functools.partial(_multiply_float, order=order) for order in orders}
    if dtype in (torch.float16, torch.bfloat16) and half_rows.is_available():
        return {"half_rows.c": _multiply_half} if num_rows <= half_rows.MAX_ROWS else {}
    return {}


def _multiply_float(layer: nn.Linear, rows: Tensor, *, order: float_rows.Order) -> Tensor:
    return float_rows.multiply(rows, layer.weight, layer.bias, order)


def _multiply_half(layer: nn.Linear, rows: Tensor) -> Tensor:
    return half_rows.multiply(rows, layer.weight, layer.bias)


def _kernels_for(layer: nn.Linear, rows: Tensor) -> dict[str, Kernel]:
    return _kernels(rows.dtype, len(rows)) if _accepts(rows, layer.weight) else {}


@keep_result(str)
def _float_kernel(*shape: Any) -> str | None:
    return find_exact_kernel(Shape(*shape), nn.Module.eval, _kernels_for)


@functools.cache
def _exact_kernel(*shape: Any) -> Kernel | None:
    """Return the first kernel that is bit-equal to torch's product in this `Shape`, or None."""
    known = _kernels(Shape(*shape).dtype, Shape(*shape).num_rows)
    return known.get(_float_kernel(*shape) or "") if known else None

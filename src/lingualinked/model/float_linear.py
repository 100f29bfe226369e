"""Linear layers in float32 whose products of few rows are computed as fast as memory gives the weight.

The weight stays as torch stores it, so that other products are torch's own. Knows no models and no stages.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, backends, nn
from torch.nn import functional

from lingualinked.kernels import float_rows
from lingualinked.model.memory import use_huge_pages
from lingualinked.model.packed_linear import absorbing_product, cancelling_product

_MIN_ELEMENTS = 1 << 13  # of a weight; a smaller one is multiplied sooner than a kernel is called
_PROBED_ELEMENTS = 1 << 20  # of a weight that is probed at full size; a larger one is probed with fewer outputs
_BLOCK_OUTPUTS = 64


class FloatLinear(nn.Linear):
    """Computes exactly what an `nn.Linear` on the CPU in float32 computes, from the same weight.

    For each number of rows, a probe (`_exact_order`), made once per process, finds the order in which torch sums; if it is
    none that the kernel knows, the product is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Multiply ``[..., in features]`` to ``[..., out features]``."""
        num_rows = input.numel() // max(self.in_features, 1)
        if 0 < num_rows <= float_rows.MAX_ROWS and self._is_plain(input):
            rows = input.reshape(num_rows, self.in_features)
            order = _exact_order(*_shape(self, num_rows))
            if order is not None and float_rows.accepts(rows, self.weight):
                return float_rows.multiply(rows, self.weight, self.bias, order).view(
                    *input.shape[:-1], self.out_features
                )
        return functional.linear(input, self.weight, self.bias)

    def kernel_name(self, num_rows: int) -> str:
        """Say what computes the product of this many rows."""
        is_known = num_rows <= float_rows.MAX_ROWS and _exact_order(*_shape(self, num_rows)) is not None
        return "float_rows.c" if is_known else "torch's own"

    def _is_plain(self, states: Tensor) -> bool:
        """Say whether torch multiplies these states with MKL, as one matrix."""
        tensors = [states, self.weight] if self.bias is None else [states, self.weight, self.bias]
        return (
            all(type(each) in (Tensor, nn.Parameter) and each.dtype is torch.float32 for each in tensors)
            and all(each.is_contiguous() and each.device.type == "cpu" for each in tensors)
            and states.dim() > 1
            and states.shape[-1] == self.in_features
            and self.weight.shape == (self.out_features, self.in_features)
            and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
            and not torch.is_autocast_enabled("cpu")
            and backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
        )


def speed_up_linears(model: nn.Module) -> None:
    """Replace linear layers of a CPU model in float32 by ones with the same parameters, where few rows gain by it."""
    layers = []
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and linear.weight.dtype is torch.float32 and _exact_order(*_shape(linear, 1)):
            layer = FloatLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            layer.weight, layer.bias = linear.weight, linear.bias
            layer.train(linear.training)
            model.set_submodule(name, layer)
            layers.append(layer)
    use_huge_pages((layer.weight.data_ptr(), layer.weight.nbytes) for layer in layers)


def _shape(layer: nn.Linear, num_rows: int) -> tuple[int, int, int, bool, int]:
    return num_rows, layer.in_features, layer.out_features, layer.bias is not None, torch.get_num_threads()


@functools.cache
def _exact_order(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    num_threads: int,
) -> float_rows.Order | None:
    """Probe in which known order torch sums in these shapes, if in any.

    A large weight is probed with fewer outputs, with the same remainder modulo the block size of the kernels.
    """
    if in_features * out_features < _MIN_ELEMENTS or not float_rows.is_available():
        return None
    num_blocks = max(num_threads, 1, _PROBED_ELEMENTS // in_features // _BLOCK_OUTPUTS)
    num_outputs = min(out_features, num_blocks * _BLOCK_OUTPUTS + out_features % _BLOCK_OUTPUTS)
    generator = torch.Generator().manual_seed(0)
    orders = float_rows.known_orders(num_rows)
    with torch.inference_mode():
        for make in (cancelling_product, absorbing_product):
            rows, weight, bias = make(num_rows, in_features, num_outputs, has_bias, generator, torch.float32)
            if not float_rows.accepts(rows, weight):
                return None
            expected = functional.linear(rows, weight, bias).view(torch.int32)  # 0 and -0 are two values
            products = {order: float_rows.multiply(rows, weight, bias, order) for order in orders}
            orders = tuple(order for order in orders if torch.equal(products[order].view(torch.int32), expected))
    return orders[0] if orders else None

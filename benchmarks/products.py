"""``python -m benchmarks products``: compares millions of outputs of each shape with torch's, bit for bit.

Knows the linear layers of stages, and the shapes of real models; a sample of them takes seconds.
"""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.console import new_console
from lingualinked.errors import LingualinkedError
from lingualinked.model.exact.float_linear import FloatLinear, speed_up_linears
from lingualinked.model.exact.packed_linear import PackedLinear, pack_linears
from lingualinked.tables import Rows

SHAPES = (  # inputs and outputs of layers of real models
    (768, 768), (768, 3072), (3072, 768), (768, 32000), (896, 4864), (1024, 3072), (2048, 2048), (2048, 5632), (5632, 2048),
    (2048, 256), (3072, 8192), (4096, 4096), (4096, 14336), (14336, 4096), (11008, 4096), (4096, 32000), (8192, 1024),
)  # fmt: skip
ROWS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 33, 64)
DTYPES = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float16: torch.int16}
_SAMPLED_SHAPES = 3
_SAMPLED_OUTPUTS = 100_000


def run_products(num_outputs: int, sample: str) -> None:
    """Print how many outputs were compared for each shape, by which kernel; raise an error if one differs."""
    draw = random.Random(sample)  # noqa: S311 - draws shapes, no secret
    cases = [(dtype, shape, bias) for dtype in DTYPES for shape in SHAPES for bias in (False, True)]
    if sample:
        cases, num_outputs = draw.sample(cases, _SAMPLED_SHAPES), min(num_outputs, _SAMPLED_OUTPUTS)
    found, num_different = [], 0
    for dtype, (num_inputs, num_layer_outputs), has_bias in cases:
        start_s = time.monotonic()
        compared, different, kernels = _compare(
            dtype, num_inputs, num_layer_outputs, has_bias, num_outputs, draw.randrange(1 << 32)
        )
        num_different += different
        found.append(
            (
                f"{num_inputs:,} x {num_layer_outputs:,}{', bias' if has_bias else ''}",
                str(dtype).removeprefix("torch."),
                ", ".join(sorted(kernels)),
                f"{compared:,}",
                f"{different:,}",
                f"{time.monotonic() - start_s:.0f}",
            )
        )
    columns = ("inputs x outputs", "dtype", "kernels", "compared", "different", "s")
    new_console().print(Rows("Products of 1 to 64 rows against torch's, bit for bit", columns, found))
    if num_different:
        raise LingualinkedError(
            f"{num_different:,} outputs differ from torch's: please report this, with the table above"
        )


def _compare(
    dtype: torch.dtype, num_inputs: int, num_layer_outputs: int, has_bias: bool, num_outputs: int, seed: int
) -> tuple[int, int, set[str]]:
    """Compare so many outputs of one shape; return how many there were, how many differ, and what computed them."""
    generator = torch.Generator().manual_seed(seed)
    compared, different = 0, 0
    kernels: set[str] = set()
    while compared < num_outputs:
        for make in (_ordinary_product, _cancelling_product):
            rows, weight, bias = make(num_inputs, num_layer_outputs, has_bias, generator)
            plain = nn.Linear(num_inputs, num_layer_outputs, has_bias, device="meta")
            plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            if bias is not None:
                plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
            layer = _as_in_a_stage(plain)
            for num_rows in ROWS:
                states = rows[:num_rows].to(dtype)
                torch.set_num_threads(1 + num_rows % 2)
                with torch.inference_mode():
                    ours = layer(states).view(DTYPES[dtype])
                    theirs = functional.linear(states, plain.weight, plain.bias).view(DTYPES[dtype])
                compared += ours.numel()
                different += int((ours != theirs).sum())
                if isinstance(layer, PackedLinear | FloatLinear):
                    kernels.add(layer.kernel_name(num_rows))
                else:
                    kernels.add("torch's own")
    return compared, different, kernels


def _as_in_a_stage(plain: nn.Linear) -> nn.Module:
    holder = nn.Sequential(plain)
    pack_linears(holder)
    speed_up_linears(holder)
    return holder[0]


def _ordinary_product(
    num_inputs: int, num_outputs: int, has_bias: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make values as models have them: states near 1, a few far larger, and weights that keep them so."""
    rows = torch.randn(ROWS[-1], num_inputs, generator=generator)
    rows[:, ::97] *= 50
    weight = num_inputs**-0.5 * torch.randn(num_outputs, num_inputs, generator=generator)
    bias = torch.randn(num_outputs, generator=generator).bfloat16() if has_bias else None
    return rows.bfloat16(), weight.bfloat16(), bias


def _cancelling_product(
    num_inputs: int, num_outputs: int, has_bias: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make terms of many magnitudes that cancel each other, so that rounding errors are what remains."""
    rows, weight, bias = _ordinary_product(num_inputs // 2, num_outputs, has_bias, generator)
    rows *= 2.0 ** torch.randint(-8, 9, (num_inputs // 2,), generator=generator)
    back = torch.randperm(num_inputs // 2, generator=generator)
    small = None if bias is None else 2.0**-16 * bias
    return torch.cat([rows, -rows[:, back]], dim=1), torch.cat([weight, weight[:, back]], dim=1), small

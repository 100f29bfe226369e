"""A product that reads the weight as torch stores it, in any order but torch's, is refused, or if it rounds or places otherwise.

All orders with all sizes take minutes: a few are drawn, unless ``LINGUALINKED_PROOF=all``. In bfloat16, torch has these
orders where oneDNN does without BF16 instructions: a process of its own is told to.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernel_checks import probed_with_few_outputs, run_elsewhere
from lane_summation import Order, multiply
from lingualinked.kernels import bfloat_rows
from lingualinked.model.exact import float_linear, products

ROWS = (1, 2, 3, 4, 7, 16)
SIZES = {
    torch.float32: (60, 64, 192, 196, 256, 384, 388, 576, 768, 1028, 2048),
    torch.float16: (64, 80, 128, 176, 208, 768, 784, 1040, 2048),
    torch.bfloat16: (64, 66, 94, 384, 388, 768, 1024, 1532, 1536, 1538, 2048),
}
NUM_OUTPUTS = 256
SCRIPT = """
import pytest
import torch
import test_float_probe as tests
from lingualinked.model.exact import kept_probes

kept_probes._can_keep = lambda: False
torch.set_num_threads(1)
with tests.probed_with_few_outputs(tests.float_linear._exact_kernel), pytest.MonkeyPatch.context() as patch:
    for dtype, *case in tests.cases():
        if dtype is torch.bfloat16:
            tests.test_another_order_is_refused(dtype, *case, patch)
    for num_rows in tests.ROWS:
        tests.test_the_order_itself_is_accepted(torch.bfloat16, num_rows, patch)
"""

Change = dict[str, object]

PLACED: dict[str, Change] = {
    "backwards": {"backwards": True},
    **{
        f"chunks of {chunk}": {"chunk": chunk} for chunk in (32, 64, 96, 128, 160, 184, 188, 196, 208, 256, 384, 512, 0)
    },
    **{f"{lanes} lanes": {"lanes": lanes} for lanes in (1, 2, 4, 8, 16, 32, 64, 128)},
    **{f"lanes added {how}": {"halves": how} for how in ("near", "in order", "backwards")},
    **{f"outputs {two} swapped": {"swapped": two} for two in ((0, 1), (3, 4), (31, 32), (62, 63))},
    "bias first": {"bias": "first"},
    "bias last": {"bias": "last"},
    "rounded lanes": {"rounded_lanes": True},
}
WRONG: dict[torch.dtype, dict[str, Change]] = {
    torch.float32: {
        **PLACED,
        "fused": {"fused": True},
        "not fused": {"fused": False},
        **{f"first {first} apart": {"first": first} for first in (0, 1, 2, 3, 4, 5, 8)},
        **{f"first four in lane {lane}": {"first": 4, "first_lane": lane, "lanes": 4} for lane in (1, 2, 3)},
        "first four backwards": {"first": 4, "first_backwards": True},
        **{f"last of {rest} apart": {"rest": rest} for rest in (8, 16, 32)},
        **{f"chunks {chunks}": {"chunks": chunks, "chunk": 192} for chunks in ("backwards", "tree", "kept")},
    },
    torch.float16: {
        **PLACED,
        **{f"last of {rest} apart": {"rest": rest} for rest in (0, 16, 32, 128)},
        **{f"rest in {lanes} lanes": {"rest_lanes": lanes} for lanes in (1, 4, 16)},
        **{f"rounded {how}": {"rounding": how} for how in ("truncated", "away")},
        "rounded before the bias": {"bias": "rounded"},
    },
    torch.bfloat16: {
        **PLACED,
        **{f"chunks of {chunk}": {"chunk": chunk} for chunk in (766, 770, 1024)},
        **{f"last of {rest} apart": {"rest": rest} for rest in (16, 32, 64)},
        "even first": {"pairs": "even first"},
        "no pairs": {"pairs": ""},
        "lanes added far": {"halves": "far"},
        **{f"rounded {how}": {"rounding": how} for how in ("truncated", "away")},
        "rounded before the bias": {"bias": "rounded"},
    },
}


def torchs_order(dtype: torch.dtype, num_rows: int, num_inputs: int) -> Order:
    if dtype is torch.float16:
        return Order(lanes=64, rest=64)
    if dtype is torch.bfloat16:
        if num_rows == 1:
            return Order(lanes=16, pairs="odd first", halves="far once")
        return Order(pairs="odd first", chunk=num_inputs if num_inputs <= 384 else min(-(-num_inputs // 2), 768))
    if num_rows < 4:
        return Order(lanes=4, fused=False, first=4 if num_rows == 1 else 0)
    return Order(chunk=-(-num_inputs // 2) if 192 < num_inputs < 384 else 192, bias="first")


def cases() -> Iterator[tuple[torch.dtype, str, int, int, bool]]:
    for dtype, orders in WRONG.items():
        for name, change in orders.items():
            draw = random.Random(f"{dtype} {name}")
            biases = (True,) if "bias" in change else (False, True)
            sizes = list(itertools.product(ROWS, SIZES[dtype]))
            drawn = sizes if os.environ.get("LINGUALINKED_PROOF") == "all" else draw.sample(sizes, 1)
            yield from ((dtype, name, *size, draw.choice(biases)) for size in drawn)


def finds_torchs_order(dtype: torch.dtype) -> bool:
    return all(float_linear._exact_kernel(dtype, num_rows, 768, 96, True, 1) is not None for num_rows in (1, 4))


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    with probed_with_few_outputs(float_linear._exact_kernel):
        yield


def is_accepted(order: Order, monkeypatch: pytest.MonkeyPatch, *shape: object) -> bool:
    """Say whether the probe takes this order for torch's."""

    def multiply_so(layer: nn.Linear, rows: Tensor, **_: object) -> Tensor:
        return multiply(rows, layer.weight, layer.bias, order)

    float_linear._exact_kernel.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(float_linear, "_multiply_float", multiply_so)
        patch.setattr(float_linear, "_multiply_half", multiply_so)
        patch.setattr(float_linear, "_multiply_bfloat", multiply_so)
        return float_linear._exact_kernel(*shape, 1) is not None


def are_the_same(first: Order, second: Order, dtype: torch.dtype, num_rows: int, num_inputs: int, bias: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        product = products.cancelling_product(num_rows, num_inputs, 96, bias, generator, dtype)
        if not torch.equal(multiply(*product, first), multiply(*product, second)):
            return False
    return True


@pytest.mark.parametrize(("dtype", "name", "num_rows", "num_inputs", "has_bias"), list(cases()), ids=str)
def test_another_order_is_refused(
    dtype: torch.dtype, name: str, num_rows: int, num_inputs: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finds_torchs_order(dtype):
        pytest.skip("torch sums in an order that is not known, here")
    right = torchs_order(dtype, num_rows, num_inputs)
    wrong = replace(right, **WRONG[dtype][name])  # type: ignore[arg-type]
    if is_accepted(wrong, monkeypatch, dtype, num_rows, num_inputs, NUM_OUTPUTS, has_bias):
        assert are_the_same(wrong, right, dtype, num_rows, num_inputs, has_bias)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_the_order_itself_is_accepted(dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not finds_torchs_order(dtype):
        pytest.skip("torch sums in an order that is not known, here")
    for num_inputs, has_bias in zip(SIZES[dtype], itertools.cycle((False, True))):
        order = torchs_order(dtype, num_rows, num_inputs)
        assert is_accepted(order, monkeypatch, dtype, num_rows, num_inputs, NUM_OUTPUTS, has_bias), num_inputs


@pytest.mark.slow
@pytest.mark.skipif(not bfloat_rows.is_available(), reason="this processor does not run the kernel")
def test_where_onednn_does_without_bf16_instructions() -> None:
    run_elsewhere(SCRIPT, Path(__file__).parent, ONEDNN_MAX_CPU_ISA="AVX512_CORE")

"""A product in any order but torch's is refused, and so is one that rounds, flushes or places otherwise.

All orders with all sizes take minutes: one size each is drawn, unless ``LINGUALINKED_PROOF=all``.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernel_checks import probed_with_few_outputs
from lingualinked.kernels import few_rows
from lingualinked.model.exact import packed_linear, products
from lingualinked.model.exact.packed_linear import PackedLinear
from summation import Order, multiply

pytestmark = pytest.mark.skipif(
    not few_rows.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="torch sums in another order here",
)

ROWS = (1, 2, 8, 33)
SIZES = (64, 65, 66, 128, 514, 768, 1025, 1026, 2048, 2050, 4098, 14336)
CHUNKS = (32, 64, 128, 192, 256, 384, 480, 510, 512, 514, 544, 768, 1022, 1024, 1026, 1536, 2048, 4096, 0)

WRONG: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    # what differs from torch's order, and numbers of inputs where the two are not the same
    **{f"chunks of {chunk}": ({"chunk": chunk}, (2050, 4098)) for chunk in CHUNKS},
    **{pairs: ({"pairs": pairs}, SIZES[:8]) for pairs in ("even first", "together", "one by one", "backwards")},
    **{f"{lanes} lanes": ({"lanes": lanes}, SIZES[:8]) for lanes in (2, 4, 8, 16)},
    **{f"chunks {chunks}": ({"chunks": chunks}, (4098, 5632)) for chunks in ("backwards", "tree", "kept")},
    "rounded chunks": ({"rounded_chunks": True}, (2048, 4098)),
    **{f"last {rest} apart": ({"rest": rest}, (64, 66, 768, 2048)) for rest in (1, 2, 4, 16, 32)},
    **{f"last {merged} not apart": ({"merged": merged}, (1026, 2050, 4098)) for merged in (2, 16, 64)},
    **{f"rounded {how}": ({"rounding": how}, SIZES[:8]) for how in ("truncated", "away", "up", "twice")},
    **{f"outputs {two} swapped": ({"swapped": two}, SIZES[:8]) for two in ((0, 1), (15, 16), (0, 32), (62, 63))},
    "bias first": ({"bias": "first"}, SIZES[:8]),
    "rounded before the bias": ({"bias": "rounded"}, SIZES[:8]),
}


def torchs_chunk(num_rows: int, num_inputs: int) -> int:
    return 512 if num_rows == 1 or num_inputs <= 1024 else 1024


def cases() -> Iterator[tuple[str, int, int, bool]]:
    for name, (change, sizes) in WRONG.items():
        biases = (True,) if "bias" in change else (False, True)
        draw = random.Random(name)
        if os.environ.get("LINGUALINKED_PROOF") == "all":
            yield from ((name, *case, draw.choice(biases)) for case in itertools.product(ROWS, SIZES))
        else:
            yield name, draw.choice(ROWS), draw.choice(sizes), draw.choice(biases)


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    with probed_with_few_outputs(packed_linear._exact_kernel):
        yield


def inject(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum in another order, wherever a packed weight is multiplied."""

    def wrong(layer: PackedLinear, rows: Tensor, **_: object) -> Tensor:
        return multiply(rows, layer.unpacked(), layer.bias, order)

    monkeypatch.setattr(packed_linear, "_multiply_few", wrong)
    monkeypatch.setattr(packed_linear, "_multiply_packed", wrong)


def are_the_same(first: Order, second: Order, num_rows: int, num_inputs: int, has_bias: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        rows, weight, bias = products.cancelling_product(num_rows, num_inputs, 96, has_bias, generator)
        if not torch.equal(multiply(rows, weight, bias, first), multiply(rows, weight, bias, second)):
            return False
    return True


@pytest.mark.parametrize(("name", "num_rows", "num_inputs", "has_bias"), list(cases()))
def test_another_order_is_refused(
    name: str, num_rows: int, num_inputs: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = torchs_chunk(num_rows, num_inputs)
    order = Order(**{"chunk": chunk, **WRONG[name][0]})  # type: ignore[arg-type]
    inject(order, monkeypatch)
    monkeypatch.setattr(products, "_TINY", 1.0)  # what underflows would refuse all of them
    if packed_linear._exact_kernel(torch.bfloat16, num_rows, num_inputs, 256, has_bias, 1) is not None:
        assert are_the_same(order, Order(chunk=chunk), num_rows, num_inputs, has_bias)


@pytest.mark.parametrize("num_rows", ROWS)
def test_the_order_itself_is_accepted_unless_it_keeps_denormals(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed_linear._exact_kernel(torch.bfloat16, num_rows, 1100, 256, True, 1) in (
        None,
        packed_linear._multiply_packed,
    ):
        pytest.skip("oneDNN sums in another order on this processor")
    for num_inputs, has_bias in ((64, False), (514, True), (1100, False), (2049, True)):
        with monkeypatch.context() as patch:
            inject(Order(chunk=torchs_chunk(num_rows, num_inputs)), patch)
            packed_linear._exact_kernel.cache_clear()
            assert (
                packed_linear._exact_kernel(torch.bfloat16, num_rows, num_inputs, 256, has_bias, 1) is None
            )  # vdpbf16ps flushes
            patch.setattr(products, "_TINY", 1.0)
            packed_linear._exact_kernel.cache_clear()
            assert packed_linear._exact_kernel(torch.bfloat16, num_rows, num_inputs, 256, has_bias, 1) is not None

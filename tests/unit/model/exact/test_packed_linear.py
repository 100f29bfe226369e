"""A packed linear layer is bit-equal to the plain one; on a processor without the kernel nothing is packed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lingualinked.model.exact import packed_linear, products
from lingualinked.model.exact.packed_linear import PackedLinear, pack_linears


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    packed_linear._exact_kernel.cache_clear()
    yield
    packed_linear._exact_kernel.cache_clear()


def linear(num_in: int, num_out: int, bias: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out, bias=bias).to(dtype)


def packed(plain: nn.Linear) -> nn.Module:
    holder = nn.Sequential(plain)
    pack_linears(holder)
    return holder[0]


def assert_equal(layer: nn.Module, plain: nn.Linear, states: Tensor) -> None:
    with torch.inference_mode():
        result, expected = layer(states), plain(states)
    assert result.shape == expected.shape
    assert torch.equal(result, expected), tuple(states.shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 64), (768, 3072), (1000, 77), (33, 128)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 31, 100])
def test_bits_are_those_of_the_plain_layer(num_in: int, num_out: int, bias: bool, rows: int) -> None:
    plain = linear(num_in, num_out, bias)
    layer = packed(plain)
    assert_equal(layer, plain, torch.randn(rows, num_in).bfloat16())
    assert_equal(layer, plain, torch.randn(2, rows, num_in).bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_that_do_not_lie_in_one_piece(bias: bool) -> None:
    plain = linear(256, 192, bias)
    layer = packed(plain)
    states = torch.randn(5, 7, 256).bfloat16()
    for view in (states[:, -1:], states[:, 1:], states[:, ::2], states[::2], states.transpose(0, 1), states[:, 0]):
        assert_equal(layer, plain, view)


@pytest.mark.parametrize("bias", [False, True])
def test_where_the_kernel_rounds_otherwise_the_weight_is_unpacked(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear(256, 192, bias)
    layer = packed(plain)
    monkeypatch.setattr(packed_linear, "_exact_kernel", lambda *_: None)
    assert_equal(layer, plain, torch.randn(3, 4, 256).bfloat16())


def backwards(layer: PackedLinear, rows: Tensor) -> Tensor:
    return nn.functional.linear(rows.flip(1), layer.unpacked().flip(1), layer.bias)


def add_bias_after_rounding(layer: PackedLinear, rows: Tensor) -> Tensor:
    product = nn.functional.linear(rows, layer.unpacked())
    return product if layer.bias is None else product + layer.bias


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(
    ("wrong", "has_bias"), [(backwards, False), (backwards, True), (add_bias_after_rounding, True)]
)
def test_the_probe_notices_another_order_of_summation(
    rows: int, wrong: packed_linear.Kernel, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "_multiply_few", lambda layer, rows, chunk: wrong(layer, rows))
    assert packed_linear._exact_kernel(torch.bfloat16, rows, 768, 96, has_bias, 1) in (
        packed_linear._multiply_packed,
        None,
    )
    packed_linear._exact_kernel.cache_clear()
    monkeypatch.setattr(packed_linear, "_multiply_packed", wrong)
    assert packed_linear._exact_kernel(torch.bfloat16, rows, 768, 96, has_bias, 1) is None


def test_what_the_probe_tries() -> None:
    generator = torch.Generator().manual_seed(0)
    for has_bias in (False, True):
        rows, weight, bias = (
            None if each is None else each.double()
            for each in products.cancelling_product(3, 300, 80, has_bias, generator)
        )
        whole = nn.functional.linear(rows, weight, bias)
        terms = nn.functional.linear(rows.abs(), weight.abs(), None if bias is None else bias.abs())
        assert (whole.abs() < 1e-3 * terms).all()
        assert bias is None or 0.5 < bias.abs().mean() < 1.5
        rows, weight, bias = products.tied_product(3, 300, 80, has_bias, generator)
        exact = nn.functional.linear(rows.double(), weight.double(), None if bias is None else bias.double())
        beyond = exact.abs() / 2.0 ** exact.abs().clamp(min=1).log2().floor() * 2**7 % 1 - 0.5
        for near in (beyond == 0, (beyond > 0) & (beyond < 1e-3), (beyond < 0) & (beyond > -1e-3)):
            assert near.float().mean() > 0.15
        assert (weight[5].abs() < 2.0**-126).float().mean() > 0.9  # not normal values


def test_small_layers_stay_plain() -> None:
    plain = linear(32, 32, True)  # torch multiplies it without oneDNN, in another order
    assert packed(plain) is plain
    assert not packed_linear._exact_kernel(torch.bfloat16, 1, 32, 32, True, 1)


SWITCHES = (31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2048, 2049)
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("make", [products.cancelling_product, products.tied_product])
def test_layers_of_all_sizes(make: Callable[..., Any], has_bias: bool) -> None:
    draw, generator = random.Random(f"{make.__name__} {has_bias}"), torch.Generator().manual_seed(1)
    sizes = [(draw.choice(SWITCHES), draw.choice(SWITCHES)) for _ in range(20)]
    for num_in, num_out in [(32, 32), (33, 32), (32, 64), (64, 64), (65, 64), (2048, 5632), *sizes]:
        for num_rows in draw.sample(ROWS, 2 if num_in < 2048 else 1):
            rows, weight, bias = make(num_rows, num_in, num_out, has_bias, generator)
            check(rows, weight, bias)
            check(rows[:1], weight, bias)


@pytest.mark.parametrize("has_bias", [False, True])
def test_values_of_all_magnitudes(has_bias: bool) -> None:
    draw, generator = random.Random(2), torch.Generator().manual_seed(2)
    for exponent in (-38, -30, -20, -3, 0, 0, 3, 15, 37):
        num_in, num_out = draw.choice(SWITCHES), draw.choice(SWITCHES)
        rows = 10.0**exponent * torch.randn(draw.choice(ROWS), num_in, generator=generator)
        weight = num_in**-0.5 * torch.randn(num_out, num_in, generator=generator)
        bias = 10.0 ** draw.choice((-2, 0, exponent)) * torch.randn(num_out, generator=generator) if has_bias else None
        check(rows.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())


def check(rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    plain.bias = None if bias is None else nn.Parameter(bias)
    assert_equal(packed(plain), plain, rows)


def test_a_processor_without_the_kernel_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("needs the cpu support avx512bw, avx512vl and avx512dq")

    monkeypatch.setattr(packed_linear, "_pack", refuse)
    plain = linear(64, 64, True)
    assert packed(plain) is plain


def test_what_would_be_held_twice_or_rounds_otherwise_stays_plain() -> None:
    class Other(nn.Linear):
        pass

    tied = nn.ModuleDict({"embedding": nn.Embedding(64, 64, dtype=torch.bfloat16), "head": linear(64, 64, False)})
    tied["head"].weight = tied["embedding"].weight
    strided, mixed = linear(256, 64, True), linear(256, 64, True)
    strided.bias = nn.Parameter(torch.randn(64, 2).bfloat16()[:, 0])
    mixed.bias = nn.Parameter(torch.randn(64))
    single, other = linear(64, 64, False, torch.float32), Other(64, 64).bfloat16()
    for plain in (tied, *map(nn.Sequential, (single, other, strided, mixed))):
        before = list(plain.children())
        pack_linears(plain)
        assert list(plain.children()) == before


def test_the_plain_weight_is_not_kept() -> None:
    layer = packed(linear(256, 256, False))
    if isinstance(layer, PackedLinear):
        assert not list(layer.parameters())

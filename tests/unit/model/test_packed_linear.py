"""A packed linear layer gives the bits of the plain one; on a processor without the kernel nothing is packed at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lingualinked.model import packed_linear
from lingualinked.model.packed_linear import PackedLinear, pack_linears


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    packed_linear._is_exact.cache_clear()
    yield
    packed_linear._is_exact.cache_clear()


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
    monkeypatch.setattr(packed_linear, "_is_exact", lambda *_: False)
    assert_equal(layer, plain, torch.randn(3, 4, 256).bfloat16())


def test_the_probe_notices_another_order_of_summation(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(rows.flip(1), weight.flip(1), bias)

    monkeypatch.setattr(packed_linear, "_pack", lambda weight: weight)
    monkeypatch.setattr(packed_linear, "_multiply", backwards)
    for rows in (1, 4, 100):
        assert not packed_linear._is_exact(rows, 768, 96, False, 1)


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
    for plain in (tied, nn.Sequential(linear(64, 64, False, torch.float32)), nn.Sequential(Other(64, 64).bfloat16())):
        before = list(plain.children())
        pack_linears(plain)
        assert list(plain.children()) == before


def test_the_plain_weight_is_not_kept() -> None:
    layer = packed(linear(256, 256, False))
    if isinstance(layer, PackedLinear):
        assert not list(layer.parameters())

"""A float32 linear layer with the kernel for few rows is bit-equal to the plain one; elsewhere it is the plain one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernel_checks import run_elsewhere
from lingualinked.kernels import bfloat_rows, float_rows, half_rows, native
from lingualinked.model.exact import float_linear
from lingualinked.model.exact.float_linear import FloatLinear, speed_up_linears
from lingualinked.model.exact.products import cancelling_product
from lingualinked.model.process.torch_settings import torch_settings

pytestmark = pytest.mark.slow

SIZES = (4, 60, 64, 100, 188, 192, 196, 256, 380, 384, 388, 576, 577, 768, 1026, 2048)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 1e-38, -3e38, 3e38)
SCRIPT = """
import test_float_linear as tests
tests.test_which_products_gain()
for dtype in tests.DTYPES:
    for rows in (1, 4, 7, 8):
        tests.test_bits_are_torchs(dtype, rows, rows % 2 > 0, 1)
        tests.test_bits_are_torchs(dtype, rows, rows % 2 < 1, 2)
    tests.test_special_values(dtype, 1, True)
    tests.test_special_values(dtype, 7, False)
"""


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    float_linear._exact_kernel.cache_clear()
    yield
    float_linear._exact_kernel.cache_clear()
    torch.set_num_threads(1)


def layer_of(weight: Tensor, bias: Tensor | None) -> FloatLinear:
    layer = FloatLinear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def assert_equal(layer: FloatLinear, states: Tensor) -> None:
    with torch.inference_mode():
        found, expected = layer(states), functional.linear(states, layer.weight, layer.bias)
    assert found.shape == expected.shape
    bits = torch.int32 if found.dtype is torch.float32 else torch.int16
    same = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    assert same.all(), tuple(states.shape)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_torchs(dtype: torch.dtype, rows: int, has_bias: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    draw, generator = random.Random(rows), torch.Generator().manual_seed(rows)
    for num_in, num_out in [(768, 96), (1056, 77), *((draw.choice(SIZES), draw.choice(SIZES)) for _ in range(4))]:
        states, weight, bias = cancelling_product(rows, num_in, num_out, has_bias, generator, dtype)
        layer = layer_of(weight, bias)
        assert_equal(layer, states)
        assert_equal(layer, states[None])
        assert_equal(layer, states[-1:])  # at another address
        for exponent in (-120, -12, 12):  # sums of products that are flushed to zero, or nearly, or too large
            assert_equal(layer, 2.0**exponent * states)


@pytest.mark.skipif(not half_rows.is_available(), reason="this processor does not run the kernel")
@pytest.mark.parametrize("instruction_set", ["AVX2", "AVX512_CORE"])
def test_other_instruction_sets(instruction_set: str) -> None:
    chosen = {"ONEDNN_MAX_CPU_ISA": instruction_set, "ATEN_CPU_CAPABILITY": instruction_set.partition("_")[0].lower()}
    run_elsewhere(SCRIPT, Path(__file__).parent, **chosen)


@pytest.mark.skipif(not half_rows.is_available(), reason="this processor does not run the kernel")
def test_which_products_gain() -> None:
    instruction_set = os.environ.get("ONEDNN_MAX_CPU_ISA")
    is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    expected = {
        torch.float32: is_amd and float_rows.is_available(),
        torch.float16: "avx512_fp16" not in native.processor_flags(),
        torch.bfloat16: instruction_set == "AVX2" or bfloat_rows.is_available(),
    }
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if instruction_set else [])):
        for rows in (1, 4, 8):
            gains = float_linear._exact_kernel(dtype, rows, 768, 96, True, 1) is not None
            assert gains == expected[dtype]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    special = torch.tensor(SPECIAL).to(dtype)
    for share in (0.001, 0.05, 1.0):
        states, weight, bias = cancelling_product(rows, 272, 68, has_bias, generator, dtype)
        for each in (states, weight, *([] if bias is None else [bias])):
            chosen = torch.rand(each.shape, generator=generator) < share
            each[chosen] = special[torch.randint(len(special), each.shape, generator=generator)][chosen]
        assert_equal(layer_of(weight, bias), states)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_what_lies_otherwise_is_torchs(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = cancelling_product(rows, 256, 64, True, generator, torch.float32)
    for offset in (1, 2, 3):  # elements from an address that is a multiple of 16 bytes
        memory = torch.empty(offset + weight.numel())
        moved = memory[offset:].view_as(weight).copy_(weight)
        assert_equal(layer_of(moved, bias), states)
        memory = torch.empty(offset + states.numel())
        assert_equal(layer_of(weight, bias), memory[offset:].view_as(states).copy_(states))
    assert_equal(layer_of(weight.T.contiguous().T, bias), states)
    assert_equal(layer_of(weight, bias), states.T.contiguous().T)
    assert_equal(layer_of(weight, bias), torch.randn(2, 5, 256)[:, -1:])
    assert_equal(layer_of(weight, bias), torch.randn(256))
    assert_equal(layer_of(weight, bias), torch.randn(0, 256))


def test_what_the_layer_is_told_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(torch.randn(96, 768), None)
    states = torch.randn(2, 768)
    monkeypatch.setattr(float_rows, "multiply", lambda *_: pytest.fail("the product is not torch's"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(states).dtype is torch.bfloat16
    with torch_settings({"float32.mkldnn.matmul": "bf16"}):
        assert_equal(layer, states)
    layer.weight.requires_grad_(True)
    layer(states).sum().backward()
    assert layer.weight.grad is not None
    layer.weight = nn.Parameter(torch.randn(48, 768).bfloat16())
    assert layer(states.bfloat16()).shape == (2, 48)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 767))


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_probe_notices_another_order(rows: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = float_rows.known_orders(rows)
    kinds = {order.kind for order in right}
    wrong = [float_rows.Order(kind, rows if kind == 2 else 0) for kind in range(3) if kind not in kinds]
    wrong += [order for order in right[1:] if order.first_lane_row != rows]  # of two threads
    for order in wrong:
        float_linear._exact_kernel.cache_clear()
        monkeypatch.setattr(float_rows, "known_orders", lambda _, order=order: (order,))
        assert float_linear._exact_kernel(torch.float32, rows, 768, 96, has_bias, 1) is None


def test_layers_of_a_model_are_replaced_and_keep_their_parameters() -> None:
    tied = nn.Embedding(256, 256)
    model = nn.ModuleDict(
        {"embedding": tied, "head": nn.Linear(256, 256, False), "other": nn.Linear(256, 256).bfloat16()}
    )
    model["head"].weight = tied.weight
    other, names = model["other"], dict(model.named_parameters())
    speed_up_linears(model)
    assert model["other"] is other
    assert model["head"].weight is tied.weight
    assert dict(model.named_parameters()) == names
    replaced = float_linear._exact_kernel(torch.float32, 1, 256, 256, False, torch.get_num_threads()) is not None
    assert isinstance(model["head"], FloatLinear) == replaced


def test_a_processor_without_the_kernel_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_rows, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(256, 256))
    before = model[0]
    speed_up_linears(model)
    assert model[0] is before

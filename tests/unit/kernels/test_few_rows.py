"""The product of few rows has torch's bits, whatever its shape, values, threads and place in memory, and stays in its buffers."""

from __future__ import annotations

import ctypes
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import event, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional

from guarded_memory import GuardedBuffer, guarded_copy
from kernel_checks import threads
from lingualinked.kernels import few_rows
from lingualinked.model.exact import packed_linear, product_probe, products
from lingualinked.model.exact.packed_linear import PackedLinear

pytestmark = pytest.mark.skipif(not few_rows.is_available(), reason="this processor does not run the kernel")

MAGNITUDES = (-38, -30, -20, -3, 0, 3, 15, 37)  # powers of ten
SPECIAL_BITS = (
    0x0000, 0x8000,  # zeros
    0x7F80, 0xFF80,  # infinities
    0x7FC0, 0xFFC0, 0x7FC5, 0xFFE3, 0x7FA1,  # NaNs, the last one signalling
    0x0001, 0x8001, 0x007F, 0x0080,  # denormals, and the smallest normal value
    0x7F7F, 0xFF7F,  # the largest values: their products overflow
)  # fmt: skip


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int16)


def layer_of(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return PackedLinear(plain)


def uses_few_rows(layer: PackedLinear, num_rows: int) -> bool:
    kernel = packed_linear._exact_kernel(*packed_linear._shape(layer, num_rows))
    return kernel not in (None, packed_linear._multiply_packed)


def assert_bits_are_torchs(rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    layer = layer_of(weight, bias)
    with torch.inference_mode():
        event(f"multiplied by few_rows.c: {uses_few_rows(layer, len(rows))}")
        found, expected = bits(layer(rows)), bits(functional.linear(rows, weight, bias))
    different = (found != expected).nonzero()
    assert not len(different), (
        f"{len(different)} of {found.numel()} outputs differ: at {different[0].tolist()} "
        f"{found[tuple(different[0])]:#06x} instead of {expected[tuple(different[0])]:#06x}"
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw a number of rows, of inputs and of outputs: of a weight that is not so small that it is never packed."""
    num_inputs = draw(st.one_of(st.integers(1, 5000), st.sampled_from([31, 33, 512, 513, 1024, 1025, 2047])))
    num_outputs = draw(
        st.integers(-(-product_probe.MIN_ELEMENTS // num_inputs), max(65, min(9000, 400_000 // num_inputs)))
    )
    return draw(st.one_of(st.integers(1, 16), st.integers(17, few_rows.MAX_ROWS))), num_inputs, num_outputs


@given(
    shape=shapes(),
    has_bias=st.booleans(),
    powers=st.tuples(*[st.sampled_from(MAGNITUDES)] * 2),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=60)
def test_bits_in_all_shapes_and_magnitudes(
    shape: tuple[int, int, int], has_bias: bool, powers: tuple[int, int], num_threads: int, seed: int
) -> None:
    num_rows, num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0 ** powers[0] * torch.randn(num_rows, num_inputs, generator=generator)
    weight = num_inputs**-0.5 * torch.randn(num_outputs, num_inputs, generator=generator)
    bias = (10.0 ** powers[1] * torch.randn(num_outputs, generator=generator)).bfloat16() if has_bias else None
    with threads(num_threads):
        assert_bits_are_torchs(rows.bfloat16(), weight.bfloat16(), bias)


@given(
    shape=shapes(),
    has_bias=st.booleans(),
    share=st.sampled_from([0.001, 0.02, 0.3, 1.0]),
    special=st.lists(st.sampled_from(SPECIAL_BITS), min_size=1),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=60)
def test_special_values_come_out_as_torchs_do_to_the_bits_of_a_nan(
    shape: tuple[int, int, int], has_bias: bool, share: float, special: list[int], seed: int
) -> None:
    num_rows, num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(special, dtype=torch.int32).to(torch.int16)

    def strew(*size: int) -> Tensor:
        ordinary = bits(torch.randn(size, generator=generator).bfloat16())
        chosen = values[torch.randint(len(values), size, generator=generator)]
        return chosen.where(torch.rand(size, generator=generator) < share, ordinary).view(torch.bfloat16)

    rows, weight = strew(num_rows, num_inputs), strew(num_outputs, num_inputs)
    assert_bits_are_torchs(rows, weight, strew(num_outputs) if has_bias else None)


def test_the_kernel_is_what_these_tests_try() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("torch is told to use other instructions")
    layer = layer_of(torch.randn(192, 256).bfloat16(), None)
    if not any(uses_few_rows(layer, num_rows) for num_rows in (1, 2)):
        pytest.skip("oneDNN sums in another order on this processor")
    assert all(uses_few_rows(layer, num_rows) for num_rows in (*range(1, 70), 128, 129, few_rows.MAX_ROWS))


@pytest.mark.parametrize("num_inputs", [255, 256])
def test_inputs_that_lie_anywhere(num_inputs: int) -> None:
    weight, bias = torch.randn(192, num_inputs).bfloat16(), torch.randn(192).bfloat16()
    layer = layer_of(weight, bias)
    memory = torch.randn(40, 3 * num_inputs).bfloat16()
    views = [
        memory[:5, 1 : 1 + num_inputs],  # at an odd address, with other values between the rows
        memory[:5, : 2 * num_inputs : 2],
        memory.flatten()[1 : 1 + 3 * num_inputs].view(3, num_inputs),  # in one piece, at an odd address
        memory[:1, :num_inputs].expand(4, -1),
        memory.T[:num_inputs, :7].T,
        memory[:3, :num_inputs].view(3, 1, num_inputs),
        memory[:3, :num_inputs].view(3, 1, num_inputs).transpose(0, 1),
        memory[0, :num_inputs],
    ]
    with torch.inference_mode():
        for view in views:
            assert torch.equal(layer(view), functional.linear(view, weight, bias)), (view.shape, view.stride())


def product_of(num_rows: int, num_inputs: int, num_outputs: int) -> tuple[Tensor, PackedLinear, Tensor]:
    """Make rows, a layer for them, and what torch multiplies them to."""
    generator = torch.Generator().manual_seed(num_rows)
    rows, weight, bias = products.cancelling_product(num_rows, num_inputs, num_outputs, True, generator)
    with torch.inference_mode():
        return rows, layer_of(weight, bias), functional.linear(rows, weight, bias)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_of_one_process_do_not_disturb_each_other(num_threads: int) -> None:
    with threads(num_threads), torch.inference_mode(), ThreadPoolExecutor(8) as pool:
        products = [product_of(num_rows, 1056, 320) for num_rows in (1, 2, 7, 16, 33)] * 50
        results = pool.map(lambda product: torch.equal(product[1](product[0]), product[2]), products)
        assert all(results)


def test_a_forked_process_computes_the_same() -> None:
    rows, layer, expected = product_of(2, 1056, 320)
    with torch.inference_mode():
        assert torch.equal(layer(rows), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
            pid = os.fork()
        if not pid:
            os._exit(0 if torch.equal(layer(rows), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(32, 256), (130, 64), (1026, 63), (512, 65), (1088, 129), (2, 4097)]
)
def test_nothing_outside_the_buffers_is_touched(
    num_inputs: int, num_outputs: int, has_bias: bool, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(torch.randn(num_outputs, num_inputs).bfloat16(), None)
    size = few_rows.num_bytes(layer.packed)
    assert few_rows.is_known_layout(layer.packed, num_inputs, num_outputs)
    weight = GuardedBuffer(size, at_end)
    ctypes.memmove(weight.address, layer.address, size)
    weight.forbid_writing()
    bias = guarded_copy(torch.randn(num_outputs).bfloat16(), at_end) if has_bias else None
    for num_threads in (1, 3):
        for num_rows in (1, 2, 5, 6, 7, 12, 13, 16, 25, 64):
            rows = guarded_copy(torch.randn(num_rows, num_inputs).bfloat16(), at_end)
            expected = few_rows.multiply(rows, layer.address, bias, num_outputs, 512)
            buffer = GuardedBuffer(2 * num_rows * num_outputs, at_end)
            with threads(num_threads), monkeypatch.context() as patch:
                patch.setattr(Tensor, "new_empty", lambda _, *shape, buffer=buffer: buffer.tensor(*shape))
                found = few_rows.multiply(rows, weight.address, bias, num_outputs, 512)
            assert found.data_ptr() == buffer.address
            assert torch.equal(found, expected)
            assert buffer.is_untouched_around()

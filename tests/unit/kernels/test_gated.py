"""Products of gates stay in their buffers, have the table's values, and say which results they do not vouch for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from guarded_memory import GuardedBuffer, guarded_copy
from lingualinked.kernels import gated

pytestmark = pytest.mark.skipif(not gated.is_available(), reason="this processor does not run the kernel")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", gated.DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 768, 4096, 12_289])
def test_nothing_outside_the_buffers_is_touched(
    count: int, dtype: torch.dtype, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = guarded_copy(gated.fill_table(functional.silu, dtype), at_end)
    gates, values = (guarded_copy(torch.randn(count).to(dtype), at_end) for _ in range(2))
    for function, expected in (
        (lambda: gated.gate(gates, values, table), table[gates.view(torch.int16).int() & 0xFFFF] * values),
        (lambda: gated.add(gates, values), gates + values),
    ):
        buffer = GuardedBuffer(values.nbytes, at_end)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda like, buffer=buffer: buffer.tensor(*like.shape, dtype=like.dtype))
            found = function()
        assert found is not None
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        assert buffer.is_untouched_around()


def test_the_last_number_of_a_table_has_a_neighbour() -> None:
    table = gated.fill_table(functional.silu, torch.bfloat16)
    assert len(table) == gated.NUM_VALUES + 1


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", gated.DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_results_that_are_not_finite_are_not_vouched_for(value: float, dtype: torch.dtype, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    table = gated.fill_table(functional.relu, dtype)
    for count in (8, 20, 10_000):
        for place in range(0, count, count // 4):
            gates, values = torch.rand(count).to(dtype) + 1, torch.rand(count).to(dtype)
            assert gated.gate(gates, values, table) is not None
            assert gated.add(gates, values) is not None
            values[place] = value
            assert gated.gate(gates, values, table) is None
            assert gated.add(gates, values) is None


def test_sums_of_float32() -> None:
    for count in (1, 8, 21):
        first, second = torch.randn(2, count)
        found = gated.add(first, second)
        assert found is not None
        assert torch.equal(found, first + second)

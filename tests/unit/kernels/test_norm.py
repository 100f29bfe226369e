"""The norm stays in its buffers, and says which results it does not vouch for."""

from __future__ import annotations

import math

import pytest
import torch

from guarded_memory import GuardedBuffer, guarded_copy
from lingualinked.kernels import norm
from lingualinked.kernels.norm import Kind

pytestmark = pytest.mark.skipif(not norm.is_available(), reason="this processor does not run the kernel")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 9, 15, 33, 768, 8421])
def test_nothing_outside_the_buffers_is_touched(
    size: int, dtype: torch.dtype, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = guarded_copy(torch.randn(size).to(dtype), at_end)
    for num_rows in (1, 2, 7):
        states = guarded_copy(torch.randn(num_rows, size).to(dtype), at_end)
        for kind in Kind:
            expected = norm.normalise(states, weight, kind, 1e-6)
            assert expected is not None
            buffer = GuardedBuffer(states.nbytes, at_end)
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch, "empty_like", lambda like, buffer=buffer: buffer.tensor(*like.shape, dtype=like.dtype)
                )
                found = norm.normalise(states, weight, kind, 1e-6)
            assert found is not None
            assert found.data_ptr() == buffer.address
            assert torch.equal(found, expected)
            assert buffer.is_untouched_around()


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_results_that_are_not_finite_are_not_vouched_for(value: float, dtype: torch.dtype, kind: Kind) -> None:
    for size in (8, 20, 768):
        for place in range(0, size, 7):
            states, weight = torch.randn(2, size).to(dtype), torch.rand(size).to(dtype)
            assert norm.normalise(states, weight, kind, 1e-6) is not None
            unusual = weight.clone()
            unusual[place] = value
            assert norm.normalise(states, unusual, kind, 1e-6) is None
            states[1, place] = value
            assert norm.normalise(states, weight, kind, 1e-6) is None
    zeros = torch.zeros(1, 32).to(dtype)
    assert norm.normalise(zeros, zeros[0], kind, 0.0) is None
    assert norm.normalise(zeros, zeros[0], kind, -1.0) is None
    assert norm.normalise(zeros, zeros[0], kind, 1e-6) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_that_overflow_are_not_vouched_for(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    states, weight = torch.ones(1, 24).to(dtype), torch.full((24,), largest, dtype=dtype)
    states[0, 3] = 4
    assert norm.normalise(states, weight, Kind.WEIGHTED, 1e-6) is None
    assert norm.normalise(states, torch.ones(24).to(dtype), Kind.WEIGHTED, 1e-6) is not None

"""The rotation stays in its buffers, and says which results it does not vouch for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from guarded_memory import GuardedBuffer, guarded_copy
from lingualinked.kernels import rotary

pytestmark = pytest.mark.skipif(not rotary.is_available(), reason="this processor does not run the kernel")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def states_of(num_rows: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = [(num_rows, 6, 1, dim), (num_rows, 2, 1, dim), (num_rows, 1, dim), (num_rows, 1, dim)]
    return [torch.randn(size).to(dtype) for size in sizes]


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_nothing_outside_the_buffers_is_touched(
    dim: int, dtype: torch.dtype, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [guarded_copy(each, at_end) for each in states_of(3, dim, dtype)]
    expected = rotary.rotate(*states)  # type: ignore[call-arg]
    buffers = []

    def new_empty(like: Tensor, *shape: int) -> Tensor:
        buffers.append(GuardedBuffer(like.nbytes, at_end))
        return buffers[-1].tensor(*shape, dtype=like.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        found = rotary.rotate(*states)  # type: ignore[call-arg]
    assert found is not None
    assert expected is not None
    assert all(map(torch.equal, found, expected))
    assert len(buffers) == 2
    assert all(each.is_untouched_around() for each in buffers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_results_that_are_not_finite_are_not_vouched_for(value: float, dtype: torch.dtype) -> None:
    states: Any = states_of(2, 32, dtype)
    assert rotary.rotate(*states) is not None
    for each in states:
        before = each[..., -1].clone()
        each[..., -1] = value
        assert rotary.rotate(*states) is None
        each[..., -1] = before
    states[0][..., :] = torch.finfo(dtype).max
    states[2][..., :], states[3][..., :] = 1, -1
    assert rotary.rotate(*states) is None

"""The probe finds attention whose bits depend on how many hidden tokens it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lingualinked.model.exact import length_probe
from lingualinked.model.exact.length_probe import AttentionShape, is_length_free

SHAPE = AttentionShape(torch.float32, torch.device("cpu"), 2, 4, 2, 16, 16)


def sums_in_halves(module: Any, query: Any, keys: Any, values: Any, mask: Any) -> tuple[torch.Tensor, None]:
    """Attention that adds up the two halves of what it reads."""
    group = module.num_key_value_groups
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    weights = (query @ keys.mT).masked_fill(~mask, -torch.inf).softmax(-1)
    half = keys.shape[2] // 2
    return weights[..., :half] @ values[:, :, :half] + weights[..., half:] @ values[:, :, half:], None


def one_by_one(module: Any, query: Any, keys: Any, values: Any, mask: Any) -> tuple[torch.Tensor, None]:
    """Attention that adds one token after the other."""
    group = module.num_key_value_groups
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    weights = (query * keys).cumsum(-1)[..., -1].masked_fill(~mask[:, :, 0], -torch.inf).exp()
    return (weights[..., None] * values).cumsum(2)[:, :, -1:] / weights.cumsum(2)[..., -1:, None], None


@pytest.mark.parametrize(("attention", "expected"), [(sums_in_halves, False), (one_by_one, True)])
def test_an_order_that_depends_on_the_length_is_found(
    attention: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_length_free.cache_clear()
    monkeypatch.setattr(length_probe, "torch_attention", attention)
    assert is_length_free(SHAPE, 24, 40, ()) is expected
    is_length_free.cache_clear()


def test_all_that_there_is_may_be_read() -> None:
    assert is_length_free(SHAPE, 40, 40, ())

"""Growing layers give attention what transformers' concatenating ones give it, whatever is done to them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lingualinked.model.kv_layers import (
    CountingLayer,
    CountingSlidingLayer,
    GrowingLayer,
    GrowingSlidingLayer,
    GrowingTensor,
)

WINDOWS = (1, 2, 7)

appends = st.tuples(st.just("append"), st.integers(1, 30))
reorders = st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=2, max_size=2))
crops = st.tuples(st.just("crop"), st.integers(0, 3))
edits = st.lists(st.one_of(appends, appends, reorders, crops), max_size=30)


def states(num_new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # [rows, tokens, heads, dim] seen as [rows, heads, tokens, dim], as attention has it.
    return tuple(torch.randn(2, num_new, 3, 4, generator=generator).transpose(1, 2) for _ in range(2))


def check(ours: Any, theirs: Any, counting: Any, edits: list[tuple[str, Any]], *, crops: bool) -> None:
    num_since_crop = 0
    for seed, (edit, value) in enumerate(edits):
        if edit == "append":
            assert ours.get_mask_sizes(value) == theirs.get_mask_sizes(value) == counting.get_mask_sizes(value)
            for left, right in zip(ours.update(*states(value, seed)), theirs.update(*states(value, seed)), strict=True):
                assert torch.equal(left, right)
            counting.advance(value)
            num_since_crop += value
        elif edit == "reorder":
            for layer in (ours, theirs, counting):
                layer.reorder_cache(torch.tensor(value))
        elif crops and num_since_crop >= max(value, 1):  # a window that was cropped has forgotten what was before it
            for layer in (ours, theirs, counting):
                layer.crop(-value)
            num_since_crop = 0
        assert ours.get_seq_length() == theirs.get_seq_length() == counting.get_seq_length()
        assert ours.is_initialized == theirs.is_initialized


@given(edits)
def test_full_attention(edits: list[tuple[str, Any]]) -> None:
    check(GrowingLayer(), DynamicLayer(), CountingLayer(), edits, crops=True)


@given(edits, st.sampled_from(WINDOWS))
def test_sliding_attention(edits: list[tuple[str, Any]], window: int) -> None:
    layers = GrowingSlidingLayer(window), DynamicSlidingWindowLayer(window), CountingSlidingLayer(window)
    check(*layers, edits, crops=False)


@given(edits, st.sampled_from(WINDOWS))
def test_sliding_attention_that_records_the_past(edits: list[tuple[str, Any]], window: int) -> None:
    layers = GrowingSlidingLayer(window), DynamicSlidingWindowLayer(window), CountingSlidingLayer(window)
    for layer in layers:
        layer.activate_past_recording()
    check(*layers, edits, crops=True)


def test_capacity_doubles() -> None:
    grown = GrowingTensor(torch.empty(1, 1, 1, 1))
    capacities = set()
    for _ in range(1000):
        grown.append(torch.zeros(1, 1, 1, 1))
        capacities.add(grown.nbytes // 4)
    assert capacities == {64, 128, 256, 512, 1024}


def test_a_sliding_window_takes_no_more_room_than_a_few_windows() -> None:
    layer = GrowingSlidingLayer(100)
    layer.update(torch.zeros(1, 1, 10_000, 1), torch.zeros(1, 1, 10_000, 1))
    for _ in range(1000):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    assert layer.nbytes <= 2 * 4 * 300


def test_reading_is_a_view_and_not_a_copy() -> None:
    layer = GrowingLayer()
    layer.update(torch.zeros(1, 1, 40, 1), torch.zeros(1, 1, 40, 1))
    first, _ = layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    second, _ = layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    assert first.data_ptr() == second.data_ptr()

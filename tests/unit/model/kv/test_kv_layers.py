"""Growing layers return the same tensors as transformers' concatenating layers, after any sequence of edits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lingualinked.model.kv import growing_tensor
from lingualinked.model.kv.counting_layers import counting_layer
from lingualinked.model.kv.growing_tensor import Growth
from lingualinked.model.kv.kv_layers import GrowingLayer, GrowingSlidingLayer
from lingualinked.planning import workload_costs
from lingualinked.planning.workload_costs import kv_capacity
from lingualinked.workload import Workload

WINDOWS = (1, 2, 7)

appends = st.tuples(st.just("append"), st.integers(1, 30))
reorders = st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=2, max_size=2))
crops = st.tuples(st.just("crop"), st.integers(0, 3))
edits = st.lists(st.one_of(appends, appends, reorders, crops), max_size=30)


def growth(reserved_tokens: int = 0, spare_bytes: float = math.inf) -> Growth:
    made = Growth(2, lambda: spare_bytes)
    made.reserved_tokens = reserved_tokens
    return made


growths = st.builds(growth, st.sampled_from([0, 1, 40, 100, 1000]), st.sampled_from([0.0, 1e4, math.inf]))


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
            for layer in (ours, counting):
                layer.drop_last(value)
            theirs.crop(-value)  # transformers' sign
            num_since_crop = 0
        assert ours.get_seq_length() == theirs.get_seq_length() == counting.get_seq_length()
        assert ours.is_initialized == theirs.is_initialized
        if ours.is_initialized:
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def sliding_layers(window: int, growth: Growth) -> tuple[Any, Any, Any]:
    counting = counting_layer(DynamicSlidingWindowLayer(window))
    return GrowingSlidingLayer(window, growth), DynamicSlidingWindowLayer(window), counting


@given(edits, growths)
def test_full_attention(edits: list[tuple[str, Any]], growth: Growth) -> None:
    check(GrowingLayer(growth), DynamicLayer(), counting_layer(DynamicLayer()), edits, crops=True)


@given(edits, st.sampled_from(WINDOWS), growths)
def test_sliding_attention(edits: list[tuple[str, Any]], window: int, growth: Growth) -> None:
    layers = sliding_layers(window, growth)
    check(*layers, edits, crops=False)


@given(edits, st.sampled_from(WINDOWS), growths)
def test_sliding_attention_that_records_the_past(edits: list[tuple[str, Any]], window: int, growth: Growth) -> None:
    layers = sliding_layers(window, growth)
    for layer in layers:
        layer.activate_past_recording()
    check(*layers, edits, crops=True)


def hold(layer: Any, *num_new: int) -> list[int]:
    """Append tokens; return the different capacities that the layer has had, in order."""
    capacities: dict[int, None] = {}
    for num_tokens in num_new:
        layer.update(*(torch.zeros(1, 1, num_tokens, 1) for _ in range(2)))
        capacities[layer.capacity] = None
    return list(capacities)


def test_capacity_doubles_where_the_end_is_not_known() -> None:
    assert hold(GrowingLayer(growth()), *[1] * 1000) == [64, 128, 256, 512, 1024]


@pytest.mark.parametrize(
    ("prompt", "reserved", "capacities"),
    [
        (8000, 8191, [8192]),  # no more than what will be held
        (100, 8191, [128, 256, 512, 1024, 2048, 4096, 8192]),  # it may end early: no more than buffers that double take
        (100, 5000, [128, 256, 512, 1024, 2048, 4096, 5056]),
    ],
)
def test_room_is_made_for_what_is_expected(prompt: int, reserved: int, capacities: list[int]) -> None:
    layer = GrowingLayer(growth(reserved))
    assert hold(layer, prompt, *[1] * (reserved - prompt)) == capacities
    longer = hold(layer, *[1] * 1000)  # than was said: little by little
    assert all(after <= 1.13 * before + 64 for before, after in itertools.pairwise([capacities[-1], *longer]))


def test_little_room_is_added_where_memory_is_short() -> None:
    # Of one row, head and number, a token takes 4 bytes each in keys and values.
    layer = GrowingLayer(growth(spare_bytes=8 * 1000))
    capacities = hold(layer, 500, *[1] * 4000)
    assert capacities[:2] == [512, 1024]
    assert all(after <= 1.13 * before + 64 for before, after in itertools.pairwise(capacities[1:]))
    short = GrowingLayer(growth(reserved_tokens=10_000, spare_bytes=8 * 1000))
    assert hold(short, 6000) == [6784]


@pytest.mark.parametrize("window", [None, 1, 2, 50, 130, 1000])
@pytest.mark.parametrize(("prompt", "num_new"), [(1, 1), (64, 64), (100, 29), (100, 700), (640, 64), (1500, 40)])
def test_what_is_planned_is_what_is_held(prompt: int, num_new: int, window: int | None) -> None:
    reserved = growth(prompt + num_new - 1)  # of the last token there is no KV
    layer = GrowingLayer(reserved) if window is None else GrowingSlidingLayer(window, reserved)
    capacities = hold(layer, prompt, *[1] * (num_new - 1))
    workload = Workload(prompt_tokens=prompt, new_tokens=num_new)
    planned = kv_capacity(workload, None if window == 1 else window)
    assert capacities[-1] <= planned <= capacities[-1] + 64


def test_plans_count_in_the_same_granules() -> None:
    assert workload_costs._KV_GRANULE_TOKENS == growing_tensor._GRANULE_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_has_the_same_bits_whatever_the_capacity(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    made = [GrowingLayer(growth(reserved)) for reserved in (0, 65, 140, 200, 1000)]
    capacities = set()
    for num_new in (100, *[1] * 100, 7, 1):
        keys, values, queries = (
            torch.randn(rows, num_new, 4, 16, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
        )
        seen = [layer.update(keys, values) for layer in made]
        capacities.add(tuple(layer.capacity for layer in made))
        results = [nn.functional.scaled_dot_product_attention(queries, *each) for each in seen]
        assert all(torch.equal(each, results[0]) for each in results)
    assert max(len(set(each)) for each in capacities) > 2


def test_a_sliding_window_takes_no_more_room_than_a_few_windows() -> None:
    layer = GrowingSlidingLayer(100, growth())
    layer.update(torch.zeros(1, 1, 10_000, 1), torch.zeros(1, 1, 10_000, 1))
    for _ in range(1000):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    assert layer.nbytes <= 2 * 4 * 300


@torch.inference_mode()
def test_reading_is_a_view_and_not_a_copy() -> None:
    layer = GrowingLayer(growth())
    layer.update(torch.zeros(1, 1, 40, 1), torch.zeros(1, 1, 40, 1))
    first, _ = layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    second, _ = layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    assert first.data_ptr() == second.data_ptr()

"""Layers that move between stages in the middle of a conversation, with their KV, change no bit: every family."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from conversations import Whole, assert_equal, beam_and_back, beams, greedy, load_stage, spec_of
from families import FAMILIES, reference
from lingualinked.model.cutting.joining import missing_spans
from moves import Moving

pytestmark = [pytest.mark.equality, pytest.mark.slow]

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_moving_layers_is_exact(family: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family, dtype)
    model, spec = reference(folder), spec_of(folder)
    said, beamed = greedy(Whole(model)), beam_and_back(Whole(model, records_past=True))
    seed = f"{family}, {dtype}"  # another schedule of moves for each
    assert_equal(greedy(Moving(spec, random.Random(seed))), said)
    assert_equal(beam_and_back(Moving(spec, random.Random(seed), records_past=True)), beamed)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "falcon-rw"])  # see test_static.py
def test_moving_static_kv_is_exact(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family, torch.bfloat16)
    model, spec, width = reference(folder), spec_of(folder), 30 if family == "bloom" else 0
    moved = beams(Moving(spec, random.Random(family), max_cache_len=30), mask_width=width)
    assert_equal(moved, beams(Whole(model, max_cache_len=30), mask_width=width))


@pytest.mark.parametrize("window", [1, 6, 9, 60])
@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_moving_static_windows_is_exact(family: str, window: int, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, spec = reference(folder, sliding_window=window), spec_of(folder, sliding_window=window)
    for lengths in ((1,) * 4, (4, 9, 3, 1, 2)):
        moved = beams(Moving(spec, random.Random(f"{window}"), max_cache_len=30), lengths)
        assert_equal(moved, beams(Whole(model, max_cache_len=30), lengths))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])  # full attention, sliding windows, experts
def test_whatever_the_schedule_of_moves(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, spec = reference(folder), spec_of(folder)
    said, beamed = greedy(Whole(model)), beam_and_back(Whole(model, records_past=True))

    @settings(max_examples=5)
    @given(schedule=st.randoms(use_true_random=False))
    def check(schedule: random.Random) -> None:
        assert_equal(greedy(Moving(spec, schedule)), said)
        assert_equal(beam_and_back(Moving(spec, schedule, records_past=True)), beamed)

    check()


def test_stages_share_the_weights_of_layers_that_stay(checkpoint: Checkpoint) -> None:
    spec = spec_of(checkpoint("llama"))
    before = load_stage(spec, 0, 3)
    after = load_stage(spec, 1, 4, shared=[before])
    for index in (1, 2):
        assert after.span.model.model.layers[index] is before.span.model.model.layers[index]
    assert before.weight_bytes > 0
    assert 0 < after.num_bytes_read < before.num_bytes_read
    assert load_stage(spec, 1, 3, shared=[before, after]).num_bytes_read == 0


def test_tied_ends_are_held_once(checkpoint: Checkpoint) -> None:
    spec = spec_of(checkpoint("gpt2"))
    whole = load_stage(spec, 0, 4, shared=[load_stage(spec, 0, 2), load_stage(spec, 2, 4)])
    model = whole.span.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert whole.weight_bytes == load_stage(spec, 0, 4).weight_bytes


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ([], [(2, 6)]),
        ([(0, 2), (6, 9)], [(2, 6)]),
        ([(0, 3)], [(3, 6)]),
        ([(3, 4)], [(2, 3), (4, 6)]),
        ([(4, 9), (0, 3)], [(3, 4)]),
        ([(0, 9)], []),
        ([(5, 6), (2, 5), (2, 3)], []),
    ],
)
def test_what_is_missing(held: list[tuple[int, int]], missing: list[tuple[int, int]]) -> None:
    assert missing_spans(2, 6, held) == missing

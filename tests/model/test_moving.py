"""Layers that move between stages in the middle of a conversation, with their KV, change no bit: every family."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from conversations import Cut, Whole, assert_equal, beam_and_back, beams, greedy, load_stage, spec_of
from families import FAMILIES, reference
from lingualinked.model.cutting.joining import missing_spans
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.spec import ModelSpec
from lingualinked.worker.kv.kv_copy import KVCopy, Piece, write_pieces

pytestmark = [pytest.mark.equality, pytest.mark.slow]

NUM_LAYERS = 4
DEVICES = ("a", "b", "c")

Checkpoint = Callable[..., Path]
Spans = list[tuple[str, int, int]]


def random_spans(rng: random.Random) -> Spans:
    """Cut into one to three spans on different devices, in any order."""
    ends = [0, *sorted(rng.sample(range(1, NUM_LAYERS), rng.randint(0, 2))), NUM_LAYERS]
    devices = rng.sample(DEVICES, len(ends) - 1)
    return [(device, ends[i], ends[i + 1]) for i, device in enumerate(devices)]


def as_received(piece: Piece) -> Piece:
    return Piece(piece.place, piece.keys.clone(), piece.values.clone())


class Moving(Cut):
    """A conversation whose stages change before some of its steps; KV is copied in advance, in small pieces."""

    def __init__(
        self, spec: ModelSpec, rng: random.Random, *, records_past: bool = False, max_cache_len: int = 0
    ) -> None:
        self._spec, self._rng = spec, rng
        self._spans = random_spans(rng)
        stages = [load_stage(spec, start, end) for _, start, end in self._spans]
        super().__init__(stages, records_past=records_past, max_cache_len=max_cache_len)
        self._next_spans: Spans = []
        self._copies: list[tuple[int, KVCopy, StageCache]] = []
        self._num_tokens = 0

    def step(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, keep: int | Tensor = 0) -> Tensor:
        if self._num_tokens:
            if not self._next_spans:
                self._prepare()
            if self._rng.random() < 0.6:
                self._send(finally_all=False)
            if self._rng.random() < 0.6:
                self._switch()
        self._num_tokens += tokens.shape[1]
        return super().step(tokens, mask, positions, keep)

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        for _, copy, _ in self._copies:
            copy.record_reorder(rows)

    def crop(self, num_tokens: int) -> None:
        super().crop(num_tokens)
        self._num_tokens -= num_tokens
        for _, copy, _ in self._copies:
            copy.record_crop()

    def _prepare(self) -> None:
        """Load the next stages, sharing what their devices hold, and begin to copy KV of layers that change devices."""
        self._next_spans = random_spans(self._rng)
        held = {
            device: [stage for (other, _, _), stage in zip(self._spans, self.stages, strict=True) if other == device]
            for device in DEVICES
        }
        self._next_stages = [
            load_stage(
                self._spec, start, end, shared=[each for each in held[device] if each.start < end and start < each.end]
            )
            for device, start, end in self._next_spans
        ]
        self._next_caches = [stage.new_cache(max_cache_len=self.max_cache_len) for stage in self._next_stages]
        self._copies = []
        for index, (source, first, stop) in enumerate(self._spans):
            for (target, start, end), cache in zip(self._next_spans, self._next_caches, strict=True):
                if source != target and max(first, start) < min(stop, end):
                    slots = self.stages[index].cache_slots(max(first, start), min(stop, end))
                    self._copies.append((index, KVCopy(self.caches[index], slots), cache))

    def _send(self, *, finally_all: bool) -> None:
        for _, copy, cache in self._copies:
            is_last = False
            while not is_last:
                pieces, is_last = copy.next_pieces(self._rng.choice([1, 2000, 10**6]))
                write_pieces(map(as_received, pieces), cache)
                if not finally_all and self._rng.random() < 0.5:
                    break

    def _switch(self) -> None:
        self._send(finally_all=True)
        for (device, _, _), cache in zip(self._next_spans, self._next_caches, strict=True):
            stayed = [
                old for (other, _, _), old in zip(self._spans, self.caches, strict=True) if other == device and old
            ]
            cache.adopt_layers(stayed)
            cache.complete_adoption(self._num_tokens, records_past=self.caches[0].records_past, lags={})
        self._spans, self.stages, self.caches = self._next_spans, self._next_stages, self._next_caches
        self._next_spans, self._copies = [], []


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

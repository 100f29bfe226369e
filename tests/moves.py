"""A conversation with stages in this process whose layers move between devices in its midst, with their KV.

Knows no workers.
"""

from __future__ import annotations

import random

from torch import Tensor

from conversations import Cut, load_stage
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.spec import ModelSpec
from lingualinked.worker.kv.kv_copy import KVCopy, Piece, StatePiece, write_pieces

NUM_LAYERS = 4
DEVICES = ("a", "b", "c")

Spans = list[tuple[str, int, int]]


def random_spans(rng: random.Random) -> Spans:
    """Cut into one to three spans on different devices, in any order."""
    ends = [0, *sorted(rng.sample(range(1, NUM_LAYERS), rng.randint(0, 2))), NUM_LAYERS]
    devices = rng.sample(DEVICES, len(ends) - 1)
    return [(device, ends[i], ends[i + 1]) for i, device in enumerate(devices)]


def as_received(piece: Piece | StatePiece) -> Piece | StatePiece:
    if isinstance(piece, StatePiece):
        return StatePiece(piece.place, tuple(tensor.clone() for tensor in piece.tensors))
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
                    is_kept = self.stages[index].span.parts.is_kept_in(max(first, start), min(stop, end))
                    self._copies.append((index, KVCopy(self.caches[index], slots, is_kept), cache))

    def _send(self, *, finally_all: bool) -> None:
        for _, copy, cache in self._copies:
            is_last = False
            while not is_last:
                pieces, is_last = copy.next_pieces(self._rng.choice([1, 2000, 10**6]), with_states=finally_all)
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

"""Texts that are decoded greedily on one stage with a static KV cache, for tests of captured steps.

Knows stages; no workers.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from conversations import extend, positions_of, prompt
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs
from lingualinked.model.stages.step_graphs import Recorder

ROOM = 40


class Text:
    """One text on a stage, decoded greedily."""

    def __init__(self, stage: Stage, cache: StageCache, *, rows: int = 1, padding: int = 0) -> None:
        self.stage, self.cache = stage, cache
        self.tokens = prompt(rows, 9)
        self.mask = torch.ones_like(self.tokens)
        self.mask[: rows // 2, :padding] = 0

    def step(self, **changes: object) -> Tensor:
        """Run a step, and return a copy of its logits."""
        inputs = {
            "tensors": (self.tokens,),
            "layout": None,
            "attention_mask": self.mask,
            "position_ids": positions_of(self.mask, self.tokens.shape[1]),
            "logits_to_keep": 1,
        }
        logits = self.stage.step(StageInputs(**(inputs | changes)), self.cache).tensors[0].clone().cpu()
        self.tokens = logits[:, -1:].argmax(-1)
        self.mask = extend(self.mask, 1)
        return logits


def decode(stage: Stage, record: Recorder | None, cache: StageCache | None = None, **of_text: int) -> list[Tensor]:
    stage.graphs.record = record
    text = Text(stage, cache or stage.new_cache(max_cache_len=ROOM), **of_text)
    return [text.step() for _ in range(12)]


def run_again(body: Callable[[], None]) -> Callable[[], None]:
    return body


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(map(torch.equal, ours, theirs))


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def hold_nothing(body: Callable[[], None]) -> Callable[[], None]:
    """As a graph of CUDA, which does not refer to the function that it was captured from."""
    method = weakref.WeakMethod(body)

    def replay() -> None:
        body = method()
        assert body is not None
        body()

    return replay

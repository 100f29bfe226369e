"""Captured decode steps give the eager bits, or are given up: with recorders that run the function again, or do worse.

Knows no CUDA: what a graph does on the device, these recorders do in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conversations import dummy_spec
from lingualinked.model.stages import step_graphs
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.step_graphs import Recorder, StepGraph
from texts_on_a_stage import ROOM, Text, assert_equal, decode, run_again


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage.load(dummy_spec("llama", "bfloat16"), 0, 4)


@pytest.fixture(autouse=True)
def fresh_graphs(stage: Stage) -> None:
    stage.graphs.refusals.clear()
    stage.graphs.num_replayed = 0
    stage.graphs.record = None


def right_once(body: Callable[[], None]) -> Callable[[], None]:
    """As a graph that holds a constant which should have changed: what it does later is what it did first."""
    runs = [body]

    def replay() -> None:
        if runs:
            runs.pop()()

    return replay


def refuse(_body: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize("of_text", [{}, {"rows": 3}, {"rows": 4, "padding": 3}], ids=str)
def test_replayed_steps_are_exact(stage: Stage, of_text: dict[str, int]) -> None:
    eager = decode(stage, None, **of_text)
    assert_equal(decode(stage, run_again, **of_text), eager)
    assert stage.graphs.num_replayed == 8  # of 11 decode steps: one to warm up, two trials


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (lambda body: lambda: None, "it gives other bits than the eager step"),
        (right_once, "it gives other bits than the eager step"),
        (refuse, "operation not permitted when stream is capturing"),
    ],
    ids=["does nothing", "right once", "can't be captured"],
)
def test_a_graph_that_is_wrong_is_given_up(
    stage: Stage, record: Recorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    eager = decode(stage, None)
    with caplog.at_level(logging.INFO, "lingualinked.model"):
        assert_equal(decode(stage, record), eager)
        assert_equal(decode(stage, record), eager)  # it is not tried again
    assert list(stage.graphs.refusals.values()) == [reason]
    assert stage.graphs.num_replayed == 0
    assert caplog.text.count(reason) == 1


def test_memory_that_is_used_again_keeps_its_graph(stage: Stage) -> None:
    eager = decode(stage, None, rows=4, padding=3)
    cache = stage.new_cache(max_cache_len=ROOM)
    decode(stage, run_again, cache, rows=4)
    cache.clear()
    stage.graphs.num_replayed = 0
    assert_equal(decode(stage, run_again, cache, rows=4, padding=3), eager)
    assert stage.graphs.num_replayed == 11


def test_sessions_beside_each_other_have_graphs_of_their_own(stage: Stage) -> None:
    eager = [decode(stage, None), decode(stage, None, rows=3)]
    stage.graphs.record = run_again
    texts = [Text(stage, stage.new_cache(max_cache_len=ROOM), rows=rows) for rows in (1, 3)]
    logits = [[text.step() for text in texts] for _ in range(12)]
    for ours, theirs in zip(zip(*logits, strict=True), eager, strict=True):
        assert_equal(list(ours), theirs)
    assert stage.graphs.num_replayed == 16


def test_reordered_rows_keep_the_graph_and_other_numbers_of_rows_do_not(stage: Stage) -> None:
    def beams(record: Recorder | None) -> list[Tensor]:
        stage.graphs.record = record
        text = Text(stage, stage.new_cache(max_cache_len=ROOM), rows=3)
        logits = []
        for index in range(14):
            logits.append(text.step())
            if index in (7, 10):
                rows = torch.tensor([2, 0, 0] if index == 7 else [1, 0])
                text.cache.reorder(rows)
                text.tokens, text.mask = text.tokens[rows], text.mask[rows]
        return logits

    assert_equal(beams(run_again), beams(None))
    assert stage.graphs.num_replayed == 7  # steps 4 to 10 of three rows; of two rows none yet


def test_layers_that_another_stage_adopts_are_captured_anew(stage: Stage) -> None:
    eager = decode(stage, None)
    stage.graphs.record = run_again
    text = Text(stage, stage.new_cache(max_cache_len=ROOM))
    logits = [text.step() for _ in range(6)]
    moved = stage.new_cache(max_cache_len=ROOM)
    moved.adopt_layers([text.cache])
    moved.complete_adoption(text.cache.num_tokens, records_past=False, lags={})
    assert not text.cache.captured
    text.cache, stage.graphs.num_replayed = moved, 0
    assert_equal(logits + [text.step() for _ in range(6)], eager)
    assert stage.graphs.num_replayed == 3


def test_a_fork_does_not_write_to_the_memory_it_was_copied_from(stage: Stage) -> None:
    eager = decode(stage, None)
    stage.graphs.record = run_again
    text = Text(stage, stage.new_cache(max_cache_len=ROOM))
    logits = [text.step() for _ in range(6)]
    fork = Text(stage, text.cache.copy())
    fork.tokens, fork.mask = text.tokens, text.mask
    assert_equal([fork.step() for _ in range(6)], eager[6:])
    assert_equal(logits + [text.step() for _ in range(6)], eager)


@pytest.mark.parametrize(
    "changes",
    [
        {"logits_to_keep": torch.tensor([0])},
        {"records": ("hidden_states",)},
        {"attention_mask": None, "position_ids": None},
        {"position_ids": None},
        {"torch_settings": {"mkldnn": False}},
    ],
    ids=str,
)
def test_steps_of_other_kinds_between_are_exact(stage: Stage, changes: dict[str, object]) -> None:
    def talk(record: Recorder | None) -> list[Tensor]:
        stage.graphs.record = record
        text = Text(stage, stage.new_cache(max_cache_len=ROOM))
        return [text.step(**(changes if index in (3, 6, 7, 8, 9, 10, 12) else {})) for index in range(14)]

    assert_equal(talk(run_again), talk(None))
    assert stage.graphs.num_replayed


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2", "phi3"])
@pytest.mark.parametrize("of_text", [{}, {"rows": 4, "padding": 3}], ids=str)
@pytest.mark.parametrize("window", [6, 14, 60])  # full from the start, after 5 steps, never
def test_sliding_windows_are_exact(family: str, window: int, of_text: dict[str, int]) -> None:
    stage = Stage.load(dummy_spec(family, "float32", sliding_window=window), 0, 4)
    eager = decode(stage, None, **of_text)
    assert_equal(decode(stage, run_again, **of_text), eager)
    assert stage.graphs.num_replayed == (8 if window != 14 else 5)
    assert not stage.graphs.refusals
    stage.graphs.num_replayed = 0
    assert_equal(decode(stage, right_once, **of_text), eager)
    assert stage.graphs.num_replayed == 0


@pytest.mark.parametrize("is_free", [False, True])
def test_graphs_read_no_more_than_they_need(is_free: bool, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "_SHORTEST", 13)  # then 26, of 40
    monkeypatch.setattr(step_graphs, "is_length_free", lambda *_: is_free)
    cache = stage.new_cache(max_cache_len=ROOM)
    eager = decode(stage, None, rows=2)
    ours = decode(stage, run_again, cache, rows=2)
    lengths = {graph._visible for graph in cache.captured.values()}
    lengths |= {kind[-1] for kind in stage.graphs.refusals}  # on this processor, they may give other bits
    if is_free:
        assert {13, 26} <= lengths
    else:
        assert_equal(ours, eager)
        assert lengths == {None}


def test_graphs_that_read_less_are_exact_as_probed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "_SHORTEST", 16)  # whole vectors: then torch's bits are equal on most processors
    cache = stage.new_cache(max_cache_len=ROOM)
    assert_equal(decode(stage, run_again, cache, rows=2), decode(stage, None, rows=2))
    assert stage.graphs.num_replayed
    assert not stage.graphs.refusals


def test_a_graph_that_would_have_other_bits_if_it_read_less_reads_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_if_less(body: Callable[[], None]) -> Callable[[], None]:
        graph: StepGraph = body.__self__
        return body if graph._visible is None else lambda: None

    monkeypatch.setattr(step_graphs, "_SHORTEST", 24)
    monkeypatch.setattr(step_graphs, "is_length_free", lambda *_: True)
    eager = decode(stage, None)
    cache = stage.new_cache(max_cache_len=ROOM)
    assert_equal(decode(stage, wrong_if_less, cache), eager)
    assert [graph._visible for graph in cache.captured.values()] == [None]
    assert stage.graphs.num_replayed == 6


def test_a_growing_cache_stays_eager(stage: Stage) -> None:
    text = Text(stage, stage.new_cache())
    stage.graphs.record = refuse
    for _ in range(4):
        text.step()
    assert not stage.graphs.refusals

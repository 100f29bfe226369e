"""Graphs ask no more of a device than it can capture, live as long as their memory, and are given up if anything fails.

Doubles stand for CUDA: they refuse what a capture refuses, and hold memory as its graphs do.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conversations import dummy_spec
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.stages import step_graphs
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.step_graphs import CudaRecorder, StepGraph
from texts_on_a_stage import ROOM, Text, assert_equal, decode, hold_nothing, no_collector, run_again

WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive"}
COPYING = {"lift_fresh"}  # torch.tensor(...), from memory that is not pinned
Body = Callable[[], None]


@pytest.fixture
def stage() -> Stage:
    return Stage.load(dummy_spec("llama", "bfloat16"), 0, 4)


class Capturing(TorchDispatchMode):
    """Refuses what waits for the device or copies from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in WAITING | COPYING:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


def as_cuda(body: Body) -> Body:
    """Run the function again, each time as strictly as CUDA does when it captures it."""

    def replay() -> None:
        with pytest.MonkeyPatch.context() as patch, Capturing():
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            body()

    return replay


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gptj", "gemma2", "mistral", "qwen2", "phi3", "cohere"])
@pytest.mark.parametrize("window", [6, 60])  # full, and never full
def test_a_device_can_capture_the_steps_of(family: str, window: int) -> None:
    stage = Stage.load(dummy_spec(family, "float32", sliding_window=window), 0, 4)
    assert_equal(decode(stage, as_cuda, rows=4, padding=3), decode(stage, None, rows=4, padding=3))
    assert not stage.graphs.refusals
    assert stage.graphs.num_replayed == 8


def test_memory_is_freed_with_the_last_reference(stage: Stage) -> None:
    caches = [stage.new_cache(max_cache_len=ROOM) for _ in range(2)]
    for cache in caches:
        decode(stage, hold_nothing, cache)
        assert cache.captured
    stage.graphs.keep(caches[0], 1000)
    assert stage.graphs.idle
    keys = [weakref.ref(cache.owned[0].keys) for cache in caches]
    owner = weakref.ref(caches[0])
    with no_collector():
        del cache
        caches.clear()
        assert [each() is None for each in keys] == [False, True]
        stage.graphs.idle.clear()
        assert owner() is None
        assert keys[0]() is None


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_graph_keeps_no_copies_of_a_trial_and_no_inputs(family: str) -> None:
    stage = Stage.load(dummy_spec(family, "float32", sliding_window=6), 0, 4)
    cache = stage.new_cache(max_cache_len=ROOM)
    decode(stage, run_again, cache)
    for graph in cache.captured.values():
        assert not graph._before
        _, _, template = graph._forward.args
        assert (template.tensors, template.attention_mask, template.position_ids) == ((), None, None)


def refuse_with(error: BaseException) -> Callable[[Body], Body]:
    def record(_body: Body) -> Body:
        raise error

    return record


ERRORS = [AttributeError("'NoneType' has no 'contiguous'"), ValueError("zip"), MemoryError(), AssertionError()]
SHORT = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"), MemoryError()]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whatever_fails_in_a_trial_the_step_has_succeeded(family: str, error: Exception) -> None:
    stage = Stage.load(dummy_spec(family, "float32", sliding_window=6), 0, 4)
    eager = decode(stage, None)

    def fail_after_running(body: Body) -> Body:
        body()
        raise error

    assert_equal(decode(stage, fail_after_running), eager)
    assert_equal(decode(stage, refuse_with(error)), eager)


@pytest.mark.parametrize("error", SHORT, ids=repr)
def test_memory_that_is_short_once_is_no_reason_for_ever(stage: Stage, error: Exception) -> None:
    eager, cache = decode(stage, None), stage.new_cache(max_cache_len=ROOM)
    tried: list[Body] = []
    assert_equal(decode(stage, lambda body: tried.append(body) or refuse_with(error)(body), cache), eager)
    assert len(tried) == 1  # not at each step
    assert not stage.graphs.refusals
    stage.graphs.keep(cache, 1000)
    assert not stage.graphs.idle  # it has no graphs
    cache.clear()
    for each in (stage.new_cache(max_cache_len=ROOM), cache):
        assert_equal(decode(stage, run_again, each), eager)
    assert stage.graphs.num_replayed == 16


def test_what_fails_in_each_length_is_not_tried_in_all(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "_MAX_FAILURES", 3)
    text = stage.new_cache(max_cache_len=ROOM)
    decode(stage, run_again, text)
    for length in range(20, 30):
        decode(stage, refuse_with(RuntimeError("no")), stage.new_cache(max_cache_len=length + 1))
    assert len(stage.graphs.refusals) == 3
    text.clear()
    stage.graphs.num_replayed = 0
    decode(stage, run_again, text)
    assert stage.graphs.num_replayed == 11  # what was captured before is still replayed


@pytest.mark.parametrize("name", ["__init__", "begin_trial"])
def test_short_memory_for_the_trial_itself_leaves_the_step_eager(
    stage: Stage, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    eager = decode(stage, None)
    monkeypatch.setattr(StepGraph, name, fail)
    assert_equal(decode(stage, run_again), eager)


def test_positions_of_another_dtype_are_another_kind(stage: Stage) -> None:
    def talk(record: Callable[[Body], Body] | None) -> list[torch.Tensor]:
        stage.graphs.record = record
        text = Text(stage, stage.new_cache(max_cache_len=ROOM))
        logits = [text.step() for _ in range(6)]
        positions = torch.full((1, 1), 14.5)  # between two tokens, which rotary embeddings can do
        return [*logits, text.step(position_ids=positions), text.step(position_ids=positions.int()), text.step()]

    assert_equal(talk(run_again), talk(None))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_memory_of_one_dtype_serves_texts_of_others(family: str) -> None:
    stage = Stage.load(dummy_spec(family, "float32", sliding_window=6), 0, 4)
    settings = [{}, {"autocast.cpu": "bfloat16"}, {"autocast.cpu": "bfloat16"}, {}]

    def talk(cache: StageCache, of_torch: dict[str, str]) -> list[torch.Tensor]:
        text = Text(stage, cache)
        return [text.step(torch_settings=of_torch) for _ in range(8)]

    eager = [talk(stage.new_cache(max_cache_len=ROOM), each) for each in settings]
    stage.graphs.record = run_again
    cache = stage.new_cache(max_cache_len=ROOM)
    for of_torch, expected in zip(settings, eager, strict=True):
        stage.graphs.num_replayed = 0
        assert_equal(talk(cache, of_torch), expected)
        assert stage.graphs.num_replayed in (4, 7)
        cache.clear()
    assert {layer.keys.dtype for layer in cache.owned.values()} == {torch.float32}


def test_whether_less_can_be_read_is_found_out_with_the_settings_of_the_step(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()
    monkeypatch.setattr(step_graphs, "_SHORTEST", 13)
    monkeypatch.setattr(step_graphs, "is_length_free", lambda *of: asked.add(of[-1]) or False)
    stage.graphs.record = run_again
    text = Text(stage, stage.new_cache(max_cache_len=ROOM))
    for of_torch in ({}, {}, {"sdp.flash": False}):
        text.step(torch_settings=of_torch)
    assert asked == {(), (("sdp.flash", False),)}


class FakeGraph:
    """A CUDA graph that can't do anything but be told from others."""

    captured: ClassVar[list[tuple[Any, ...]]] = []

    def capture_begin(self, *pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self._pool = pool[0] if pool else object()
        FakeGraph.captured.append((self._pool, torch.cuda.current_stream()))

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...

    def pool(self) -> Any:
        return self._pool


class FakeStream:
    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    current = [FakeStream()]

    @contextlib.contextmanager
    def enter(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    step_graphs._capture_stream.cache_clear()
    FakeGraph.captured.clear()
    yield FakeGraph.captured
    FakeGraph.captured.clear()
    step_graphs._capture_stream.cache_clear()


def test_graphs_share_memory_while_one_of_them_lives_and_one_stream_for_ever(captured: list[tuple[Any, ...]]) -> None:
    device = torch.device("cuda:0")
    record, other = CudaRecorder(device), CudaRecorder(device)
    first, second = record(lambda: None), record(lambda: None)
    del second  # the latest one
    third = record(lambda: None)
    other_stage = other(lambda: None)
    del first, third
    last = record(lambda: None)
    pools, streams = zip(*captured, strict=True)
    assert pools[0] is pools[1] is pools[2]
    assert len({id(pool) for pool in pools}) == 3
    assert len(set(streams)) == 1
    del last, other_stage


def test_a_capture_that_fails_is_ended(captured: list[tuple[Any, ...]]) -> None:
    record = CudaRecorder(torch.device("cuda:0"))
    with pytest.raises(ValueError, match="no"):
        record(lambda: refuse_with(ValueError("no"))(run_again))
    assert gc.isenabled()
    assert len(captured) == 1
    assert isinstance(torch.cuda.current_stream(), FakeStream)


def test_a_processor_has_no_graphs(stage: Stage) -> None:
    assert stage.graphs.record is None

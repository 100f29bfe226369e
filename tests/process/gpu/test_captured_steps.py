"""Steps that CUDA captures give the eager bits, full windows included, and leave no memory; on a CPU they are run again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import accelerators
from conversations import dummy_spec
from lingualinked.model.process.memory import release_memory
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.step_graphs import Recorder
from texts_on_a_stage import ROOM, assert_equal, decode, no_collector, run_again

pytestmark = pytest.mark.equality


@pytest.fixture
def gpu() -> str:
    if accelerators.chosen == "cpu":
        pytest.skip("of a GPU's memory")
    return accelerators.chosen


def load(family: str) -> Stage:
    return Stage.load(dummy_spec(family, "bfloat16", sliding_window=6), 0, 4, accelerator=accelerators.chosen)


def record_of(stage: Stage) -> Recorder:
    return stage.graphs.record or run_again


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_they_are_captured_and_exact(family: str) -> None:
    stage = load(family)
    record = record_of(stage)
    eager = decode(stage, None, rows=4, padding=3)
    assert_equal(decode(stage, record, rows=4, padding=3), eager)
    assert not stage.graphs.refusals
    assert stage.graphs.num_replayed == 8


@pytest.mark.usefixtures("gpu")
def test_memory_ends_with_the_cache() -> None:
    stage = load("gemma2")
    record = record_of(stage)
    held = []
    with no_collector():
        for _ in range(40):
            decode(stage, record, stage.new_cache(max_cache_len=ROOM), rows=2)
            held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[2]


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch's allocator does not survive a capture that fails")
def test_what_can_not_be_captured_leaves_the_device_as_it_was(gpu: str) -> None:
    stage = load("llama")

    def record(body: Callable[[], None]) -> Callable[[], None]:
        def wait() -> None:
            body()
            torch.ones(1, device=gpu).item()

        return own(wait)

    own, eager = record_of(stage), decode(stage, None)
    assert_equal(decode(stage, record), eager)
    assert "captur" in "".join(stage.graphs.refusals.values())
    release_memory(gpu)
    stage.graphs.refusals.clear()
    assert_equal(decode(stage, own), eager)
    assert stage.graphs.num_replayed == 8

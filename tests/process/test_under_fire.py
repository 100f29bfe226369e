"""Everything that has several steps on their way, at once on one model: through deaths, closes, moves, and callbacks that raise."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import lingualinked as ll
from processes import stopped
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow]

IDS = torch.tensor([[1, 17, 93, 54, 8]])
ROWS = torch.tensor([[1, 17, 93], [1, 5, 6], [1, 101, 45], [1, 8, 17]])
BATCH = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
WITHIN_S = 20.0  # a bound against hanging, far below every time-out
SPANS = ([("a", 0, 2), ("b", 2, 4)], [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)], [("c", 0, 3), ("d", 3, 4)])


class Failing(BaseStreamer, StoppingCriteria):
    """A caller's own code, which raises at some token."""

    def __init__(self, num_left: int) -> None:
        self._num_left = num_left

    def _count(self) -> None:
        self._num_left -= 1
        if self._num_left < 0:
            raise ZeroDivisionError("the caller's own")

    def put(self, value: torch.Tensor) -> None:
        self._count()

    def end(self) -> None:
        raise AssertionError("it has not raised before")

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def decode(model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, **arguments})  # type: ignore[no-any-return]


def batch(model: Any) -> list[list[int]]:
    prompts = [[1, *range(5, 6 + length)] for length in range(5)]
    outputs = model.generate_batch(prompts, BATCH).values()
    for output in outputs:
        if output.error is not None:
            name, _, cause = output.error.partition(": ")
            raise getattr(ll, name)("b", cause) if name == "WorkerDiedError" else getattr(ll, name)(cause)
    return [output.generated_tokens for output in outputs]


CALLS: dict[str, Callable[[Any], Any]] = {
    "run": decode,
    "sampled": lambda model: decode(model, do_sample=True) is None,
    "split": lambda model: decode(model, ROWS, num_microbatches=2),
    "split and sampled": lambda model: decode(model, ROWS, num_microbatches=3, do_sample=True) is None,
    "chunks": lambda model: decode(model, IDS.repeat(2, 8), prefill_chunk_size=8, max_new_tokens=4, num_microbatches=2),
    "batch": batch,
}
FAILING: dict[str, Callable[[Any, int], Any]] = {
    "streamer": lambda model, at: decode(model, streamer=Failing(at)),
    "criteria": lambda model, at: decode(
        model, ROWS, num_microbatches=2, stopping_criteria=StoppingCriteriaList([Failing(at)])
    ),
    "both, sampled": lambda model, at: decode(
        model, do_sample=True, streamer=Failing(at), stopping_criteria=StoppingCriteriaList([Failing(at)])
    ),
}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(len(CALLS) + 2) as pool:
        yield pool


def num_pending(cluster: ll.Cluster) -> int:
    return len(cluster._engine._exchange._pending._pending)


def errors_of(calls: list[Future[Any]]) -> set[str]:
    return {type(each.exception(WITHIN_S)).__name__ for each in calls}


@pytest.mark.parametrize("killed", [0, -1], ids=["first", "last"])
def test_a_worker_is_killed_in_the_middle_of_everything(tiny_llama: str, pool: ThreadPoolExecutor, killed: int) -> None:
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    with ll.ShardedModel.from_pretrained(tiny_llama, devices=devices, plan=ll.Plan.from_spans(SPANS[0])) as model:
        pid = model.cluster.pids["ab"[killed]]
        stopped(pid)
        calls = [pool.submit(call, model) for call in CALLS.values()]
        wait_until(lambda: num_pending(model.cluster) >= len(CALLS))
        os.kill(pid, signal.SIGKILL)
        closing = pool.submit(model.close)
        assert errors_of(calls) <= {"WorkerDiedError", "ClosedError"}
        closing.result(WITHIN_S)
        assert num_pending(model.cluster) == 0


def test_a_model_is_closed_in_the_middle_of_everything(
    shared_cluster: ll.Cluster, tiny_llama: str, pool: ThreadPoolExecutor
) -> None:
    plan = ll.Plan.from_spans(SPANS[0])
    model: Any = ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan=plan, progress=False)

    def repeat(call: Callable[[Any], Any]) -> None:
        while True:
            call(model)

    calls = [pool.submit(repeat, call) for call in CALLS.values()]
    wait_until(lambda: num_pending(shared_cluster) >= 3)
    model.close()
    assert errors_of(calls) == {"ClosedError"}
    assert num_pending(shared_cluster) == 0


def test_everything_at_once_while_layers_move_and_callers_raise(
    shared_cluster: ll.Cluster, tiny_llama: str, unsharded: PreTrainedModel, pool: ThreadPoolExecutor
) -> None:
    uncut = {"run": decode(unsharded), "split": decode(unsharded, ROWS)}
    plans = [ll.Plan.from_spans(spans) for spans in SPANS]
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan=plans[0], progress=False) as model:
        expected = {name: call(model) for name, call in CALLS.items()}
        for name, ids in uncut.items():
            assert torch.equal(expected[name], ids)
        enough = threading.Event()

        def move() -> int:
            for count, plan in enumerate(itertools.cycle(plans[1:] + plans[:1])):
                if enough.is_set():
                    return count
                model.rebalance(plan)
            raise AssertionError

        def use(seed: int) -> None:
            moments = random.Random(seed)
            for name in moments.sample([*CALLS, *FAILING], 4):
                if name in FAILING:
                    with pytest.raises(ZeroDivisionError):
                        FAILING[name](model, moments.randrange(20))
                else:
                    found = CALLS[name](model)
                    same = (
                        torch.equal(found, expected[name])
                        if isinstance(found, torch.Tensor)
                        else found == expected[name]
                    )
                    assert same, name

        moving = pool.submit(move)
        try:
            for each in [pool.submit(use, seed) for seed in range(7)]:
                each.result()
        finally:
            enough.set()
        assert moving.result() > 0
        wait_until(lambda: sum(num_sessions(model)) == 0)
        assert num_pending(shared_cluster) == 0

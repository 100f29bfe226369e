"""Steps that wait for a stage run in one pass with the bits that each has alone, and one that fails fails alone."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.kernels import few_rows
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.stages.stage import Stage
from lingualinked.protocol.failures import StepFailed
from lingualinked.protocol.messages import decode, encode
from lingualinked.protocol.running import BeginRun, TokensChosen
from lingualinked.protocol.steps import MOST_TOGETHER, KVEdit, KVEditKind, Step, StepGroup
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.transport.wire.hop_clock import clock_us
from lingualinked.worker.background import Background
from lingualinked.worker.messaging.joined_steps import split_group
from lingualinked.worker.stages import hosted_stage
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps import failed_steps
from lingualinked.worker.steps.pace import Pace
from lingualinked.worker.steps.step_runner import StepRunner
from model_of_vectors import NUM_LAYERS, load_stage
from unit.worker.stages.test_hosted_stage import STEP

NUM_SESSIONS = 4
PROMPTS = {session: torch.arange(3, 6 + 7 * session)[None] for session in range(1, NUM_SESSIONS + 1)}


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return [load_stage(0, 2), load_stage(2, NUM_LAYERS)]


class Worker:
    """A step runner with one stage, and what it sends; other steps wait until they are asked for."""

    def __init__(self, stage: Stage, *, max_kv_tokens: int | None = None, num_stages: int = 1) -> None:
        self.sent: list[tuple[str, Any, tuple[Tensor, ...]]] = []
        self.name, self.encode_s = "worker", 0.0
        hosted = HostedStages("cpu", Background(lambda: None))
        self.hosted = HostedStage(stage, "before", "after", max_kv_tokens, num_stages)
        hosted._stages[StageKey(1, 1, 0)] = self.hosted
        mailbox: Any = self
        peers: Any = Peers(self)
        self.runner = StepRunner(mailbox, peers, hosted, Pace(1, 1.0), "cpu")

    def send(self, to: str, payload: bytes, tensors: tuple[Tensor, ...] = ()) -> int:
        self.sent.append((to, decode(payload), tensors))
        return 0

    def run(self, *steps: tuple[Step, Tensor], decode_s: float = 0.0) -> int:
        """Run the first step, with what joins it; return how many have run in one pass."""
        first, *others = [
            (step, Delivery(sender="before", payload=b"", tensors=(tensor,), num_bytes=9, decode_s=decode_s))
            for step, tensor in steps
        ]
        num_taken = 1

        def take(accepts: Callable[..., bool], most: int) -> list[Any]:
            nonlocal num_taken
            taken = []
            while len(taken) < most and others and accepts(*others[0]):
                taken.append(others.pop(0))
            num_taken += len(taken)
            return taken

        self.runner.serve_steps(first, take)
        return num_taken

    def begin_runs(self) -> None:
        for session in PROMPTS:
            begin = BeginRun(
                model=1, plan_version=1, session=session, number=0, num_steps=50, first_name="first", processors=(),
                samples=False, rows=None, unfinished=(True,), eos_token_ids=(), pad_token_id=0, mask=MaskMode.EXTEND,
                positions=PositionMode.FROM_MASK, position_rows=1,
            )  # fmt: skip
            self.runner.handle_run(begin, ())


class Peers:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def send(self, to: str, message: Any, tensors: tuple[Tensor, ...]) -> int:
        self._worker.sent.append((to, message, tensors))
        return 0


def step(session: int, number: int, **changes: object) -> Step:
    step = msgspec.structs.replace(STEP, session=session, number=number, runner="runner", run_steps=50)
    return msgspec.structs.replace(step, **changes)


def inputs(stage: Stage, session: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * session + number)
    num_new = PROMPTS[session].shape[1] if number == 0 else 1
    if stage.is_first:
        return torch.randint(3, 300, (1, num_new), generator=generator)
    return torch.randn((1, num_new, 128), generator=generator).to(torch.bfloat16)


def worker_with_prompts(stage: Stage, **of_worker: Any) -> Worker:
    worker = Worker(stage, **of_worker)
    if worker.hosted.most_together == 1:
        pytest.skip("no kernel here computes rows one by one")
    worker.begin_runs()
    for session in PROMPTS:
        states = inputs(stage, session, 0)
        mask = torch.ones(1, states.shape[1], dtype=torch.long)
        first = step(session, 0, mask=MaskMode.FULL)
        delivery = Delivery(sender="before", payload=b"", tensors=(states, mask), num_bytes=9)
        worker.runner.serve_step(first, delivery)
    worker.sent.clear()
    return worker


def decode_steps(stage: Stage, number: int) -> list[tuple[Step, Tensor]]:
    encoded = {"mask": MaskMode.EXTEND, "positions": PositionMode.FROM_MASK, "position_rows": 1}
    return [(step(session, number, **encoded), inputs(stage, session, number)) for session in PROMPTS]


def results(worker: Worker) -> dict[tuple[int, int], Any]:
    """What was sent of each session's step: hidden states, or the token."""
    found: dict[tuple[int, int], Any] = {}
    for to, message, tensors in worker.sent:
        if isinstance(message, TokensChosen):
            found[message.session, message.number] = message.tokens
        elif to == "after":
            steps = message.steps if isinstance(message, StepGroup) else (message,)
            for each, states in zip(steps, tensors[0], strict=True):
                found[each.session, each.number] = states.tolist()
    return found


@pytest.mark.equality
@pytest.mark.parametrize("index", [0, 1])
def test_steps_that_run_together_give_what_each_gives_alone(stages: list[Stage], index: int) -> None:
    stage = stages[index]
    together, alone = worker_with_prompts(stage), worker_with_prompts(stage)
    for number in range(1, 6):
        steps = decode_steps(stage, number)
        assert together.run(*steps) == NUM_SESSIONS
        for each in steps:
            assert alone.run(each) == 1
    assert results(together) == results(alone)
    assert len(results(alone)) == 5 * NUM_SESSIONS
    groups = [message for _, message, _ in together.sent if isinstance(message, StepGroup)]
    assert [len(group.steps) for group in groups] == 5 * [NUM_SESSIONS]
    # they can go on alone: masks and KV are what they would have been
    for number in (6, 7):
        for each in decode_steps(stage, number):
            assert together.run(each) == alone.run(each) == 1
    assert results(together) == results(alone)


def test_a_stage_runs_at_most_its_share_together(stages: list[Stage]) -> None:
    worker = worker_with_prompts(stages[0], num_stages=2)
    assert worker.run(*decode_steps(stages[0], 1)) == NUM_SESSIONS / 2


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 2},
        {"session": 1},  # the first one again
        {"session": 99},
        {"runner": ""},
        {"stage": 1},
        {"mask": MaskMode.FULL},
        {"logits_to_keep": 0},
        {"rope_reach": 8},
        {"torch_settings": (("autocast", True),)},
        {"records": ("hidden_states",)},
        {"edits": (KVEdit(kind=KVEditKind.CROP, values=(1,)),)},
        {"position_rows": 2},
        {"layout": (True, True)},
    ],
    ids=str,
)
def test_a_step_that_does_something_else_runs_alone(stages: list[Stage], changes: dict[str, Any]) -> None:
    first, (other, states), *_ = decode_steps(stages[0], 1)
    worker = worker_with_prompts(stages[0])
    assert worker.run(first, (msgspec.structs.replace(other, **changes), states)) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.ones(shape, dtype=torch.long) for shape in ((1, 2), (2, 1), (1,), (1, 0), (1, 1, 1))),
        torch.ones(1, 1),
        torch.tensor([[-1]]),  # no token
        torch.tensor([[2**62]]),
    ],
    ids=str,
)
def test_so_does_one_with_other_inputs(stages: list[Stage], tensor: Tensor) -> None:
    first, (other, _), *_ = decode_steps(stages[0], 1)
    assert worker_with_prompts(stages[0]).run(first, (other, tensor)) == 1


def test_one_that_exceeds_the_budget_fails_alone(stages: list[Stage]) -> None:
    prompts = sum(prompt.shape[1] for prompt in PROMPTS.values())
    worker = worker_with_prompts(stages[0], max_kv_tokens=prompts + NUM_SESSIONS - 1)
    assert worker.run(*decode_steps(stages[0], 1)) == NUM_SESSIONS
    failures = [(to, message.session) for to, message, _ in worker.sent if isinstance(message, StepFailed)]
    assert failures == [(CALLER, NUM_SESSIONS)]
    assert set(results(worker)) == {(session, 1) for session in range(1, NUM_SESSIONS)}
    assert NUM_SESSIONS not in worker.hosted.sessions


def test_all_fail_by_themselves_if_the_pass_does(stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_with_prompts(stages[0])

    def fail(_: object) -> None:
        raise ArithmeticError("no")

    monkeypatch.setattr(worker.hosted.packed, "run", fail)
    worker.run(*decode_steps(stages[0], 1))
    failed = [message.session for _, message, _ in worker.sent if isinstance(message, StepFailed)]
    assert failed == list(PROMPTS)
    assert not worker.hosted.sessions


@pytest.mark.parametrize("index", [0, 1])
def test_all_fail_by_themselves_if_their_results_can_not_be_sent(
    stages: list[Stage], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_with_prompts(stages[index])

    def fail(*_: object) -> int:
        raise ProtocolError("too large")

    monkeypatch.setattr(Peers, "send", fail)
    assert worker.run(*decode_steps(stages[index], 1)) == NUM_SESSIONS
    failed = [(to, message.session) for to, message, _ in worker.sent if isinstance(message, StepFailed)]
    assert failed == [(CALLER, session) for session in PROMPTS]


def test_errors_of_a_pass_are_gone_when_memory_is_freed(stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_with_prompts(stages[0])
    errors: list[weakref.ref[Exception]] = []
    alive: list[bool] = []

    def fail(_: object) -> None:
        raise NoMemoryError

    class NoMemoryError(MemoryError):
        def __init__(self) -> None:
            errors.append(weakref.ref(self))

    monkeypatch.setattr(worker.hosted.packed, "run", fail)
    monkeypatch.setattr(failed_steps, "release_memory", lambda _: alive.append(errors[0]() is not None))
    gc.disable()
    try:
        worker.run(*decode_steps(stages[0], 1))
    finally:
        gc.enable()
    assert alive == [False]


def test_decoding_is_not_counted_as_travel(stages: list[Stage]) -> None:
    decode_s = 1000.0
    worker = worker_with_prompts(stages[0])
    sent_us = (clock_us() - round(decode_s * 1e6)) % 2**32
    steps = [(msgspec.structs.replace(each, sent_us=sent_us), states) for each, states in decode_steps(stages[0], 1)]
    assert worker.run(*steps, decode_s=decode_s) == NUM_SESSIONS
    [group] = [message for _, message, _ in worker.sent if isinstance(message, StepGroup)]
    assert max(each.timings[-1].hop_us for each in group.steps) < decode_s * 1e6 / 2


def test_steps_run_alone_where_it_cant_be_found_out_how_many_may_run_together(
    stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, expected = worker_with_prompts(stages[0]), worker_with_prompts(stages[0])

    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(hosted_stage, "most_alone", fail)
    del worker.hosted.most_together  # which is known by now
    steps = decode_steps(stages[0], 1)
    assert worker.run(*steps) == 1  # the others still wait: none is lost
    expected.run(steps[0])
    assert results(worker) == results(expected) != {}


def test_it_is_not_found_out_while_no_step_waits(stages: list[Stage]) -> None:
    worker = worker_with_prompts(stages[0])
    del worker.hosted.most_together
    first, second, *_ = decode_steps(stages[0], 1)
    assert worker.run(first) == 1
    assert "most_together" not in vars(worker.hosted)
    assert worker.run(second, *decode_steps(stages[0], 2)[:1]) == 2
    assert "most_together" in vars(worker.hosted)


def test_no_more_run_together_than_may(stages: list[Stage]) -> None:
    worker = worker_with_prompts(stages[0])
    vars(worker.hosted)["most_together"] = NUM_SESSIONS - 1
    assert worker.run(*decode_steps(stages[0], 1)) == NUM_SESSIONS - 1


@pytest.mark.equality
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_no_number_in_one_does_not_change_others(stages: list[Stage], index: int, value: float) -> None:
    stage = stages[index]
    together, alone = worker_with_prompts(stage), worker_with_prompts(stage)
    for worker in (together, alone):
        cache = worker.hosted.sessions[2].cache
        assert cache is not None
        for layer in cache.owned.values():
            for grown in layer._grown:
                with torch.inference_mode():
                    grown._buffer.fill_(value)
    for number in range(1, 4):
        steps = decode_steps(stage, number)
        if not stage.is_first:
            steps[1][1][:] = value
        assert together.run(*steps) == NUM_SESSIONS
        for each in steps:
            alone.run(each)
    found, expected = (
        {key: each for key, each in results(worker).items() if key[0] != 2} for worker in (together, alone)
    )
    assert found == expected
    assert len(expected) == 3 * (NUM_SESSIONS - 1)


def test_a_group_of_more_steps_than_run_together_is_no_message() -> None:
    steps = tuple(step(number, 1) for number in range(MOST_TOGETHER + 1))
    assert few_rows.MAX_ROWS <= MOST_TOGETHER
    assert decode(encode(StepGroup(steps=steps[1:])))
    for wrong in (steps, ()):
        with pytest.raises(ProtocolError):
            decode(encode(StepGroup(steps=wrong)))


@pytest.mark.parametrize("tensors", [(), (torch.ones(1, 1),), (torch.ones(2),), 2 * (torch.ones(2, 1),)])
def test_a_group_with_other_tensors_is_refused(tensors: tuple[Tensor, ...]) -> None:
    group = StepGroup(steps=(step(1, 1), step(2, 1)))
    delivery = Delivery(sender="before", payload=b"", tensors=tensors, num_bytes=9)
    with pytest.raises(ProtocolError, match="a group of 2 steps arrived with the tensors"):
        list(split_group(group, delivery))


def test_an_empty_group_is_refused() -> None:
    delivery = Delivery(sender="before", payload=b"", tensors=(torch.ones(0, 1),), num_bytes=9)
    with pytest.raises(ProtocolError, match="a group of 0 steps"):
        list(split_group(StepGroup(steps=()), delivery))

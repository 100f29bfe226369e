"""What begins a run may say anything: a worker says why it begins none, and keeps nothing of it; only the run's own steps count."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.model.sampling.processor_data import BatchRows, ProcessorSpec, TensorData
from lingualinked.protocol.failures import StepFailed
from lingualinked.protocol.messages import decode
from lingualinked.protocol.moving import JoinedRows
from lingualinked.protocol.running import BeginRun, EndRun
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.background import Background
from lingualinked.worker.stages.hosted_stages import HostedStages
from lingualinked.worker.steps.pace import Pace
from lingualinked.worker.steps.runs import Runs
from lingualinked.worker.steps.step_runner import StepRunner
from message_examples import example
from unit.worker.stages.test_hosted_stage import STEP, hosted_stage, run

IDS = torch.tensor([[1, 5], [2, 7]])
STATE = torch.Generator().get_state()
LOGITS = torch.tensor([[[0.0, 3.0, 1.0, 2.0]], [[5.0, 3.0, 1.0, 2.0]]])


def begin(**fields: Any) -> BeginRun:
    message: Any = example(BeginRun)  # type: ignore[arg-type]
    known = {
        "model": STEP.model,
        "session": STEP.session,
        "number": 0,
        "num_steps": 3,
        "processors": (),
        "samples": False,
        "rows": None,
        "unfinished": (True, True),
        "eos_token_ids": (),
        "pad_token_id": 0,
    }
    return msgspec.structs.replace(message, **(known | fields))  # type: ignore[no-any-return]


def top_k(*values: Any) -> tuple[ProcessorSpec, ...]:
    return (ProcessorSpec("TopKLogitsWarper", values),)


class Worker:
    """A runner of steps without stages, and what it sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.name, self.encode_s = "me", 0.0
        mailbox: Any = self
        peers: Any = None
        stages = HostedStages("cpu", Background(lambda: None))
        self.runner = StepRunner(mailbox, peers, stages, Pace(1, 1.0), "cpu")

    def send(self, to: str, payload: bytes, tensors: tuple[Tensor, ...] = ()) -> int:
        self.sent.append((to, decode(payload)))
        return 0


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        (begin(), (IDS,)),
        (begin(samples=True), ()),
        (begin(samples=True), (IDS, STATE)),
        (begin(samples=True), (STATE[:-1],)),
        (begin(samples=True), (STATE[:0],)),
        (begin(samples=True), (STATE.repeat(1000),)),
        (begin(samples=True), (STATE.long(),)),
        (begin(samples=True), (STATE[None],)),
        (begin(samples=True), (torch.full_like(STATE, 255),)),
        (begin(processors=top_k(5, 0.0, 1)), (IDS[:1],)),
        (begin(processors=top_k(5, 0.0, 1)), (IDS.float(),)),
        (begin(processors=top_k(5, 0.0, 1)), (IDS[0],)),
        (begin(processors=top_k(5, 0.0)), (IDS,)),
        (begin(processors=(ProcessorSpec("LogitsProcessor", ()),)), (IDS,)),
        (begin(processors=(ProcessorSpec("__class__", ()),)), (IDS,)),
        (
            begin(
                processors=(ProcessorSpec("SuppressTokensLogitsProcessor", (TensorData("int64", (10**12,), (1,)),)),)
            ),
            (IDS,),
        ),
        (
            begin(
                processors=(ProcessorSpec("EncoderRepetitionPenaltyLogitsProcessor", (1.5, TensorData("int64", (0,), ()))),),
                rows=BatchRows(0, 2, 4),
            ),
            (IDS,),
        ),
        (begin(eos_token_ids=(2**64 - 1,)), ()),
    ],
)  # fmt: skip
def test_who_asks_for_a_run_that_can_not_begin_is_told_why(message: BeginRun, tensors: tuple[Tensor, ...]) -> None:
    worker = Worker()
    worker.runner.handle_run(message, tensors)
    ((to, failed),) = worker.sent
    assert to == CALLER
    assert isinstance(failed, StepFailed)
    assert (failed.model, failed.session, failed.number) == (message.model, message.session, message.number)
    assert worker.runner._runs._runs == worker.runner._runs._early == {}


@pytest.mark.parametrize(
    "processors",
    [
        top_k(10**18, -float("inf"), 1),
        top_k(-5, 0.0, 1),
        top_k("5", None, True),
        (ProcessorSpec("NoRepeatNGramLogitsProcessor", (10**18,)),),
        (ProcessorSpec("SuppressTokensLogitsProcessor", (TensorData("int64", (2,), (10**17, -9)),)),),
        (ProcessorSpec("ForcedEOSTokenLogitsProcessor", (3, TensorData("int64", (1,), (10**9,)))),),
        (ProcessorSpec("TemperatureLogitsWarper", (float("nan"),)),),
        (ProcessorSpec("MinLengthLogitsProcessor", (10**18, TensorData("int64", (1,), (3,)))),),
    ],
)
@pytest.mark.parametrize("rows", [None, BatchRows(0, 2, 2), BatchRows(7, 3, 10**15), BatchRows(-1, 9, -4)])
def test_absurd_numbers_choose_tokens_or_none(processors: tuple[ProcessorSpec, ...], rows: BatchRows | None) -> None:
    runs = Runs()
    runs.begin(begin(processors=processors, rows=rows, samples=True, num_steps=10**18), (IDS, STATE))
    tokens = runs._runs[STEP.session].choose(LOGITS)
    assert tokens is None or (tokens.shape == (2,) and 0 <= int(tokens.min()) <= int(tokens.max()) < 4)


def test_only_the_due_step_of_the_run_of_its_model_belongs_to_it() -> None:
    runs = Runs()
    runs.begin(begin(number=4), ())
    due = msgspec.structs.replace(STEP, number=4, runner="me")
    assert runs.find(due) is not None
    for fields in ({"number": 3}, {"number": 5}, {"model": 9}, {"session": 9}, {"runner": ""}):
        assert runs.find(msgspec.structs.replace(due, **fields)) is None


def test_what_ends_another_run_or_a_later_one_ends_none() -> None:
    runs = Runs()
    runs.begin(begin(number=4), ())
    token_run = runs._runs[STEP.session]
    for stale in ({"model": 9}, {"session": 9}, {"number": 10**9}):
        known = {"model": STEP.model, "session": STEP.session, "number": 4} | stale
        runs.end(EndRun(**known))
        assert token_run.num_left == 3
    runs.end(EndRun(model=STEP.model, session=STEP.session, number=4))
    assert token_run.num_left == 1


def test_steps_that_wait_for_runs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.worker.steps.runs._MOST_EARLY", 3)
    runs, delivery = Runs(), Delivery(sender="before", payload=b"", tensors=(), num_bytes=1)
    for session in range(3):
        runs.keep_early(msgspec.structs.replace(STEP, session=session), delivery)
    with pytest.raises(ProtocolError, match="no more may"):
        runs.keep_early(msgspec.structs.replace(STEP, session=9), delivery)
    runs.drop(STEP.model, 1)
    runs.drop(STEP.model + 1)
    assert runs._early.keys() == {0, 2}
    runs.drop(STEP.model)
    assert runs._early == {}


def test_runs_that_wait_for_steps_of_sessions_that_are_gone_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.worker.steps.runs._MOST_EARLY", 3)
    runs = Runs()
    runs.begin(begin(session=100), ())
    runs._runs[100].choose(LOGITS)
    for session in range(9):
        runs.begin(begin(session=session), ())
    assert runs._runs.keys() == {100, 6, 7, 8}


def test_the_last_stage_may_send_steps_of_a_run_that_the_caller_has_begun_alone() -> None:
    hosted = hosted_stage()
    run(hosted, 1, 2, runner="last", run_steps=2)
    following = msgspec.structs.replace(STEP, number=1, run_steps=1, runner="last")
    assert hosted.runner_of(following) == "last"
    for fields in ({"run_steps": 2}, {"run_steps": 10**9}, {"number": 0}, {"number": 2}, {"session": 2}):
        assert hosted.runner_of(msgspec.structs.replace(following, **fields)) == ""
    run(hosted, 1, 1, number=1)  # the caller goes on
    assert hosted.runner_of(msgspec.structs.replace(following, number=2, run_steps=0)) == ""


def test_nobody_runs_a_session_that_was_made_of_one_in_a_run() -> None:
    hosted = hosted_stage()
    for session in (1, 2):
        run(hosted, 1, 2, session=session, runner="last", run_steps=2)
    hosted.fork_session(1, 1, 3)
    hosted.join_sessions(4, [JoinedRows(session=each, number=1, edits=()) for each in (1, 2)])
    for session in (3, 4):
        stale = msgspec.structs.replace(STEP, session=session, number=hosted.sessions[session].number, runner="last")
        assert hosted.runner_of(stale) == ""


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [(1, 1), (9, 1)],
        [(1, 1), (1, 1)],
        [(1, 1), (2, 0)],
        [(1, 1), (2, 10**9)],
        [(9, 1)] * 10_000,
    ],
)
def test_sessions_that_are_not_here_are_not_joined_and_the_others_stay(parts: list[tuple[int, int]]) -> None:
    hosted = hosted_stage()
    for session in (1, 2):
        run(hosted, 1, 2, session=session)
    with pytest.raises(ProtocolError):
        hosted.join_sessions(4, [JoinedRows(session=each, number=number, edits=()) for each, number in parts])
    assert {key: (each.number, each.context.num_tokens) for key, each in hosted.sessions.items()} == {
        1: (1, 2),
        2: (1, 2),
    }
    with pytest.raises(ProtocolError):
        hosted.join_sessions(2, [JoinedRows(session=1, number=1, edits=())])

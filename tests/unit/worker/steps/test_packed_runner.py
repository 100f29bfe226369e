"""Packed steps from other parties can't harm sessions that are not theirs to step, and a text that fails fails alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.model.packed.packed_pass import PassInputs
from lingualinked.model.packed.token_choice import TokenChoice
from lingualinked.model.sampling.processor_data import ProcessorSpec
from lingualinked.model.stages.stage_data import StageOutput
from lingualinked.protocol.failures import FailureKind
from lingualinked.protocol.messages import decode
from lingualinked.protocol.packed import PackedDone, PackedFailed, PackedFailure, PackedStep, PackedText
from lingualinked.protocol.steps import KVEdit, KVEditKind
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.background import Background
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps.pace import Pace
from lingualinked.worker.steps.packed_runner import PackedRunner
from lingualinked.worker.steps.packed_texts import check_packed
from unit.worker.stages.test_hosted_stage import hosted_stage

MODEL, VERSION = 1, 1


class CountingPass:
    """In place of a stage: keeps no KV but counts tokens, and returns what it is given."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, inputs: PassInputs) -> StageOutput:
        if self.error is not None:
            raise self.error
        for part in inputs.parts:
            part.cache.advance(part.num_new)
        return StageOutput(tensors=(inputs.states,), layout=None)


class Worker:
    """A runner with one stage of each of two plan versions, and what it sends."""

    def __init__(self, *, is_last: bool = False, max_kv_tokens: int | None = None) -> None:
        self.sent: list[tuple[str, Any, tuple[Tensor, ...]]] = []
        self.encode_s = 0.0
        self.stages = HostedStages("cpu", Background(lambda: None))
        for version in (VERSION, VERSION + 1):
            hosted: Any = hosted_stage(max_kv_tokens)
            hosted.packed, hosted.stage.is_last = CountingPass(), is_last
            self.stages._stages[StageKey(MODEL, version, 0)] = hosted
        mailbox: Any = self
        peers: Any = Peers(self)
        self.runner = PackedRunner(mailbox, peers, self.stages, Pace(1, 1.0), "cpu")

    def send(self, to: str, payload: bytes, tensors: tuple[Tensor, ...] = ()) -> int:
        self.sent.append((to, decode(payload), tensors))
        return 0

    def hosted(self, version: int = VERSION) -> HostedStage:
        return self.stages.get_stage(StageKey(MODEL, version, 0))

    def receive(self, step: PackedStep, *tensors: Tensor) -> None:
        states = tensors or (torch.arange(sum(text.num_new for text in step.texts)).reshape(1, -1),)
        self.runner.receive_step(step, Delivery(sender="before", payload=b"", tensors=states, num_bytes=1))


class Peers:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def send(self, to: str, message: Any, tensors: tuple[Tensor, ...]) -> int:
        self._worker.sent.append((to, message, tensors))
        return 0


def text(session: int, number: int = 0, num_new: int = 1, num_logits: int = 1, **fields: Any) -> PackedText:
    return PackedText(session=session, number=number, num_new=num_new, num_logits=num_logits, **fields)


def packed(*texts: PackedText, **fields: Any) -> PackedStep:
    step = PackedStep(
        model=MODEL,
        plan_version=VERSION,
        stage=0,
        number=7,
        texts=texts,
        failures=(),
        layout=None,
        sent_us=0,
        timings=(),
    )
    return msgspec.structs.replace(step, **fields)


FAILURE = PackedFailure(session=1, stage=0, kind=FailureKind.ERROR, cause="", traceback="")
ROW = torch.zeros(1, 2, 8)


@pytest.mark.parametrize(
    ("step", "tensors", "because"),
    [
        (packed(text(1), text(1)), (ROW,), "several parts"),
        (packed(text(1, num_new=2), failures=(FAILURE,)), (ROW,), "several parts"),
        (packed(text(1), text(2)), (), "2 sessions with 2 tokens"),
        (packed(text(1), text(2)), (ROW, ROW), "2 sessions with 2 tokens"),
        (packed(text(1)), (ROW,), "1 session with 1 token"),
        (packed(text(1), text(2)), (torch.zeros(2, 2, 8),), "2 sessions"),
        (packed(text(1), text(2)), (torch.zeros(2),), "2 sessions"),
        (packed(), (ROW,), "0 sessions"),
        (packed(text(1, num_new=2, num_logits=3)), (ROW,), "3 logits"),
        (packed(text(1, num_new=2, num_logits=0, choice=TokenChoice())), (ROW,), "0 logits"),
        (
            packed(
                text(1, num_new=2, choice=TokenChoice((ProcessorSpec("RepetitionPenaltyLogitsProcessor", (1.5,)),)))
            ),
            (ROW,),
            "is not a logits processor that chooses tokens",
        ),
    ],
)
def test_what_is_malformed_is_refused(step: PackedStep, tensors: tuple[Tensor, ...], because: str) -> None:
    with pytest.raises(ProtocolError, match=because):
        check_packed(step, tensors)


def test_the_budget_is_of_all_sessions_also_behind_a_text_that_failed() -> None:
    worker = Worker(max_kv_tokens=8)
    worker.receive(packed(text(1, num_new=3), text(2, num_new=6), text(3, num_new=4), text(4, num_new=2)))
    _, onward, _ = worker.sent[-1]
    assert [each.session for each in onward.texts] == [1, 3]
    assert [each.session for each in onward.failures] == [2, 4]
    assert "9 tokens" in onward.failures[0].cause
    assert "9 tokens" in onward.failures[1].cause
    worker.receive(packed(text(1, 1), text(3, 1), text(4)))
    assert [each.session for each in worker.sent[-1][1].texts] == [1, 4]


def test_a_text_that_can_not_run_is_left_out_and_the_others_go_on() -> None:
    worker = Worker()
    worker.receive(packed(text(1), text(2, num_new=2)))
    worker.receive(packed(text(1, 5), text(2, 1, num_new=3), text(9, 1)))
    to, onward, (states,) = worker.sent[-1]
    assert to == "after"
    assert [each.session for each in onward.texts] == [2]
    assert [each.session for each in onward.failures] == [1, 9]
    assert "step 5 of session 1 arrived, and step 1 is due" in onward.failures[0].cause
    assert states.tolist() == [[1, 2, 3]]
    assert worker.hosted().sessions[1].number == 1  # as it was: the caller ends it
    assert worker.hosted().sessions[2].context.num_tokens == 5


def test_a_step_without_texts_passes() -> None:
    worker = Worker(is_last=True)
    worker.runner.receive_step(
        packed(failures=(FAILURE,)), Delivery(sender="before", payload=b"", tensors=(), num_bytes=1)
    )
    ((to, done, tensors),) = worker.sent
    assert (to, done.sessions, done.failures, tensors) == (CALLER, (), (FAILURE,), ())


@pytest.mark.parametrize("because", ["budget", "rows", "no KV", "padding", "edit"])
def test_sessions_that_can_not_take_part(because: str) -> None:
    worker = Worker(max_kv_tokens=8)
    hosted = worker.hosted()
    part = text(1, num_new=9 if because == "budget" else 1)
    if because != "budget":
        session = hosted.find_session(1, 0, 1, 0, keeps_kv=because != "no KV")
        session.context.num_tokens = 1
        part = text(1, 1)
        if because == "rows":
            states = torch.zeros(2, 2, 1, 4)
            for layer in session.cache.owned.values():  # type: ignore[union-attr]
                layer.update(states, states)
        elif because == "padding":
            session.context.mask = torch.tensor([[0]])
        elif because == "edit":
            part = text(1, 1, edits=(KVEdit(kind=KVEditKind.CROP, values=(2,)),))
    worker.receive(packed(part, text(2)))
    onward = worker.sent[-1][1]
    assert [each.session for each in onward.texts] == [2]
    expected = {
        "budget": "exceeds max_kv_tokens=8",
        "rows": "has 2 rows, and must have one",
        "no KV": "keeps KV",
        "padding": "has no padding",
        "edit": "a crop of 2 tokens exceeds",
    }
    assert expected[because] in onward.failures[0].cause
    assert 1 not in hosted.sessions


def test_a_pass_that_fails_ends_all_its_sessions_and_no_other() -> None:
    worker = Worker()
    worker.receive(packed(text(1), text(2), text(3)))
    worker.hosted().packed.error = RuntimeError("no")  # type: ignore[attr-defined]
    worker.receive(packed(text(1, 1), text(2, 1)))
    to, failed, _ = worker.sent[-1]
    assert to == CALLER
    assert isinstance(failed, PackedFailed)
    assert (failed.number, failed.cause) == (7, "RuntimeError: no")
    assert worker.hosted().sessions.keys() == {3}


NO_NUMBER = TokenChoice((ProcessorSpec("TemperatureLogitsWarper", (float("nan"),)),), seed=3)
NO_PROCESSOR = TokenChoice((ProcessorSpec("TopKLogitsWarper", ("x", 0.0, 1)),))  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", [NO_NUMBER, NO_PROCESSOR, TokenChoice(seed=2**64)])
def test_a_text_of_which_no_token_can_be_chosen_fails_alone(choice: TokenChoice) -> None:
    worker = Worker(is_last=True)
    logits = torch.tensor([[[0.0, 1.0], [3.0, 2.0], [0.0, 1.0], [4.0, 5.0], [6.0, 7.0], [9.0, 8.0]]])
    worker.receive(
        packed(
            text(1, choice=TokenChoice(returns_logprob=True)),
            text(2, num_new=2, num_logits=2, choice=msgspec.structs.replace(choice, returns_logits=True)),
            text(3, num_new=2, num_logits=2),
            text(4, choice=TokenChoice(returns_logits=True)),
        ),
        logits,
    )
    to, done, (returned,) = worker.sent[-1]
    assert (to, done.sessions, done.tokens, len(done.logprobs)) == (CALLER, (1, 3, 4), (1, 0), 1)
    assert [(each.session, each.stage) for each in done.failures] == [(2, 0)]
    assert torch.equal(returned, logits[0, 3:])
    assert worker.hosted().sessions.keys() == {1, 3, 4}


def test_a_stage_that_is_not_here_is_reported() -> None:
    worker = Worker()
    worker.receive(packed(text(1), plan_version=9))
    assert "is not hosted here" in worker.sent[-1][1].cause


def test_a_step_waits_until_all_its_sessions_have_moved() -> None:
    worker = Worker()
    worker.receive(packed(text(1), text(2)))
    moved = {"plan_version": VERSION + 1}
    worker.receive(packed(text(1, 1), text(2, 1), **moved))
    worker.receive(packed(text(1, 2), **moved))  # behind the other one, though its session moves first
    worker.receive(packed(text(5), **moved))
    assert [step.texts[0].session for _, step, _ in worker.sent] == [1, 5]
    worker.stages.move_session(MODEL, 1, VERSION + 1)
    worker.runner.run_due()
    assert len(worker.sent) == 2
    worker.stages.move_session(MODEL, 2, VERSION + 1)
    worker.runner.run_due()
    assert [len(step.texts) for _, step, _ in worker.sent] == [2, 1, 2, 1]
    assert not any(step.failures for _, step, _ in worker.sent)


def test_steps_of_a_model_that_moves_on_are_reported() -> None:
    worker = Worker()
    worker.receive(packed(text(1)))
    worker.receive(packed(text(1, 1), plan_version=VERSION + 1, number=8))
    worker.runner.drop_model(MODEL)
    failed = worker.sent[-1][1]
    assert isinstance(failed, PackedFailed)
    assert failed.number == 8
    assert "has not moved" in failed.cause
    worker.runner.run_due()
    assert worker.sent[-1][1] is failed


def test_too_many_steps_that_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.worker.steps.packed_runner._MOST_EARLY", 2)
    worker = Worker()
    worker.receive(packed(text(1)))
    for number in (1, 2):
        worker.receive(packed(text(1, number), plan_version=VERSION + 1))
    with pytest.raises(ProtocolError, match="too many packed steps wait"):
        worker.receive(packed(text(1, 3), plan_version=VERSION + 1))


def test_the_last_stage_answers_with_what_was_asked_for() -> None:
    worker = Worker(is_last=True)
    logits = torch.tensor([[[0.0, 3.0], [4.0, 0.0], [0.0, 1.0], [2.0, 1.0]]])
    texts = (
        text(1, choice=TokenChoice()),
        text(2, num_new=2, num_logits=2),
        text(3, choice=TokenChoice(returns_logits=True)),
    )
    worker.receive(packed(*texts), logits)
    to, done, (kept,) = worker.sent[-1]
    assert (to, type(done), done.sessions, done.tokens) == (CALLER, PackedDone, (1, 2, 3), (1, 0))
    assert torch.equal(kept, logits[0, 1:])

"""What the last stage says of a run is believed only if it can be so; nothing else reaches the caller's loop."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.runs.run_in_flight import RunInFlight
from lingualinked.cluster.steps.step_in_flight import StepOptions
from lingualinked.cluster.steps.step_reply import RunReply
from lingualinked.errors import WorkerError
from lingualinked.model.context import ContextCode, MaskMode, PositionMode
from lingualinked.planning.plan import Plan
from lingualinked.protocol.running import TokensChosen
from message_examples import STEP, TIMES

VOCABULARY = 64
CHOSEN = TokensChosen(model=3, session=9, number=100_000, timings=(TIMES, TIMES), tokens=(5, 63), goes_on=True)
LATER = ContextCode(mask=MaskMode.EXTEND, positions=PositionMode.FROM_MASK, position_rows=2, tensors=())
LOGITS = torch.zeros(2, 1, VOCABULARY)


class Session:
    """Counts what a run tells it."""

    num_steps: int | None = None

    def count_steps(self, num_steps: int, positions: PositionMode) -> None:
        self.num_steps = num_steps

    def finish_silent_steps(self, most_tokens: int = 0, until: object = None) -> None:
        pass

    def record_step(self, sample: object, num_new: int) -> None:
        pass


def start(vocabulary: int | None = VOCABULARY, run_steps: int = 2) -> RunInFlight:
    step = msgspec.structs.replace(STEP, run_steps=run_steps)
    route = Route(1, Plan.from_spans([("a", 0, 2), ("b", 2, 4)]))
    nothing: Any = None
    session: Any = Session()
    inputs = torch.zeros(2, 5, dtype=torch.long)
    return RunInFlight(step, route, inputs, 1, 0, StepOptions(), {}, nothing, session, LATER, vocabulary)


def receive(run: RunInFlight, *tensors: Tensor, **fields: Any) -> bool:
    return run._receive(RunReply(msgspec.structs.replace(CHOSEN, **fields), tensors, 1))


def test_tokens_are_taken_in_order_until_the_run_ends() -> None:
    run = start()
    assert receive(run)
    assert receive(run, number=100_001, tokens=(7, 0))
    assert not receive(run, LOGITS, number=100_002, tokens=(), goes_on=False)
    assert run._session.num_steps == 2  # type: ignore[attr-defined]
    taken = []
    while run.await_tokens():
        taken.append(run.take_tokens())
        if len(taken) == 3:
            break
    assert [each.tokens is None for each in taken] == [False, False, True]
    assert taken[1].tokens is not None
    assert taken[1].tokens.tolist() == [7, 0]


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        ((), {"number": 99_999}),
        ((), {"number": 100_001}),
        ((), {"number": 2**62}),
        ((), {"tokens": ()}),
        ((), {"tokens": (5,)}),
        ((), {"tokens": (5,) * 10_000}),
        ((), {"tokens": (5, VOCABULARY)}),
        ((), {"tokens": (5, 2**64 - 1)}),
        ((), {"timings": ()}),
        ((), {"timings": (TIMES,) * 3}),
        ((LOGITS,), {}),
        ((LOGITS,), {"goes_on": False}),
        ((LOGITS,), {"tokens": ()}),
        ((LOGITS, LOGITS), {"tokens": (), "goes_on": False}),
        *[
            ((logits,), {"tokens": (), "goes_on": False})
            for logits in (
                LOGITS.long(),
                LOGITS[0],
                LOGITS[:1],
                LOGITS[:, :0],
                LOGITS[..., 1:],
                LOGITS[0, 0, 0],
                LOGITS.to(torch.float8_e5m2),
            )
        ],
    ],
)
def test_what_can_not_be_is_refused(tensors: tuple[Tensor, ...], fields: dict[str, Any]) -> None:
    run = start()
    with pytest.raises(WorkerError, match="where step 100000 of 2 rows and 2 stages was due"):
        receive(run, *tensors, **fields)
    assert not run._received


def test_no_token_is_taken_that_no_tensor_can_hold() -> None:
    with pytest.raises(WorkerError):
        receive(start(vocabulary=None), tokens=(5, 2**63))
    assert receive(start(vocabulary=None), tokens=(5, 2**63 - 1))


def test_a_run_without_end_is_refused() -> None:
    run = start(run_steps=1)
    assert receive(run)
    with pytest.raises(WorkerError):
        receive(run, number=100_001)

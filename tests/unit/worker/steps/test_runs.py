"""Runs on the last stage: what begins them is checked, tokens are chosen row by row, and steps that are stale belong to none."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from lingualinked.errors import ProtocolError
from lingualinked.protocol.running import BeginRun, EndRun
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.steps.runs import Runs, TokenRun
from message_examples import STEP, example

BEGIN: Any = msgspec.structs.replace(
    example(BeginRun), session=9, number=4, num_steps=3, samples=False, unfinished=(True, True), eos_token_ids=(2,)
)
STATE = torch.Generator().get_state()
DELIVERY: Any = Delivery("previous", b"", (), 0)


def step(number: int, runner: str = "last") -> Any:
    return msgspec.structs.replace(STEP, model=BEGIN.model, session=9, number=number, runner=runner, run_steps=2)


def logits(*tokens: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), 8).float()[:, None]


def test_rows_that_have_ended_get_the_padding_token() -> None:
    run = TokenRun(msgspec.structs.replace(BEGIN, pad_token_id=7), ())
    assert run.choose(logits(2, 5)).tolist() == [2, 5]  # type: ignore[union-attr]
    assert run.choose(logits(4, 2)).tolist() == [7, 2]  # type: ignore[union-attr]
    assert run.num_left == 0


def test_the_next_step_goes_to_the_first_stage() -> None:
    run = TokenRun(BEGIN, ())
    run.choose(logits(3, 5))
    onward = run.next_step(step(4), "last", 0)
    assert (onward.stage, onward.number, onward.runner, onward.run_steps) == (0, 5, "last", 1)
    assert (onward.timings, onward.edits, onward.layout, onward.shape) == ((), (), None, None)


@pytest.mark.parametrize(
    ("samples", "tensors"),
    [
        (False, (STATE,)),
        (True, ()),
        (True, (STATE.long(),)),
        (True, (STATE[:100],)),
        (True, (torch.zeros(1 << 17, dtype=torch.uint8),)),
        (True, (torch.zeros_like(STATE),)),
    ],
)
def test_what_does_not_fit_a_run_is_refused(samples: bool, tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ProtocolError):
        TokenRun(msgspec.structs.replace(BEGIN, samples=samples), tensors)


def test_other_steps_belong_to_no_run() -> None:
    runs = Runs()
    assert runs.begin(BEGIN, ()) is None
    assert runs.find(step(4)) is not None
    assert runs.find(step(3)) is runs.find(step(5)) is runs.find(step(4, runner="")) is None
    runs.end(EndRun(model=BEGIN.model + 1, session=9, number=4))
    assert runs.find(step(4)).num_left == 3  # type: ignore[union-attr]
    runs.end(EndRun(model=BEGIN.model, session=9, number=4))
    assert runs.find(step(4)).num_left == 1  # type: ignore[union-attr]
    runs.drop(BEGIN.model, 9)
    assert runs.find(step(4)) is None


def test_a_first_step_may_come_before_its_run() -> None:
    runs = Runs()
    runs.keep_early(step(4), DELIVERY)
    assert runs.begin(BEGIN, ()) == (step(4), DELIVERY)
    for session in range(1000):
        runs.keep_early(msgspec.structs.replace(step(0), session=session), DELIVERY)
    with pytest.raises(ProtocolError, match="wait for their runs"):
        runs.keep_early(step(0), DELIVERY)
    runs.drop(BEGIN.model)
    runs.keep_early(step(0), DELIVERY)

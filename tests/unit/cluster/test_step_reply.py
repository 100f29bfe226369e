"""An answer to a step is believed only if it can be one."""

from __future__ import annotations

import pytest
import torch

import lingualinked as ll
from lingualinked.cluster.steps.step_reply import StepReply, _delays, check_reply
from lingualinked.protocol.steps import StageTimes

TIMES = (StageTimes(received_bytes=1, hop_us=2, wait_us=3, compute_us=4, codec_us=5),) * 2
INPUTS = torch.zeros(3, 5, dtype=torch.long)


def check(tensors: tuple[torch.Tensor, ...], times: tuple[StageTimes, ...], keep: int | torch.Tensor) -> torch.Tensor:
    return check_reply(StepReply(tensors, times, 1), ("a", "b"), INPUTS, keep, 64)


@pytest.mark.parametrize(
    ("keep", "num_kept"), [(0, 5), (1, 1), (3, 3), (9, 5), (-2, 3), (torch.tensor([4, 0]), 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_asked_for_is_taken(keep: int | torch.Tensor, num_kept: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, num_kept, 64, dtype=dtype)
    assert check((logits,), TIMES, keep) is logits


def test_what_was_asked_for_in_each_row_is_taken() -> None:
    positions, mask = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.eye(3, 5).bool()
    for keep, shape in ((positions, (3, 2, 64)), (mask, (3, 64))):
        logits = torch.zeros(shape)
        assert check((logits,), TIMES, keep) is logits


def test_no_logits_are_taken_where_none_were_asked_for() -> None:
    reply, logits = StepReply((), TIMES, 1), StepReply((torch.zeros(3, 1, 64),), TIMES, 1)
    assert check_reply(reply, ("a", "b"), INPUTS, 1, 64, wants_logits=False).shape == (3, 0, 64)
    with pytest.raises(ll.WorkerError, match="where no logits and the times of 2 were due"):
        check_reply(logits, ("a", "b"), INPUTS, 1, 64, wants_logits=False)


GOOD = torch.zeros(3, 1, 64)


@pytest.mark.parametrize(
    ("tensors", "times"),
    [
        ((), TIMES),
        ((GOOD, GOOD), TIMES),
        ((GOOD,), ()),
        ((GOOD,), TIMES[:1]),
        ((GOOD,), TIMES * 2),
        ((torch.tensor(1.0),), TIMES),
        ((torch.zeros(64),), TIMES),
        ((torch.zeros(2, 1, 64),), TIMES),
        ((torch.zeros(3, 2, 64),), TIMES),
        ((torch.zeros(3, 1, 63),), TIMES),
        ((torch.zeros(3, 1, 64, 1),), TIMES),
        ((GOOD.long(),), TIMES),
        ((GOOD.bool(),), TIMES),
        ((GOOD.to(torch.complex64),), TIMES),
        ((GOOD.to(torch.float8_e5m2),), TIMES),
    ],
)
def test_what_was_not_is_the_fault_of_who_answered(
    tensors: tuple[torch.Tensor, ...], times: tuple[StageTimes, ...]
) -> None:
    with pytest.raises(
        ll.WorkerError, match="device 'b' raised ProtocolError: the answer to a step came with"
    ) as caught:
        check(tensors, times, 1)
    assert caught.value.device == "b"
    assert isinstance(caught.value.__cause__, ll.ProtocolError)


def test_an_unknown_vocabulary_is_not_checked() -> None:
    check_reply(StepReply((GOOD[..., :7],), TIMES, 1), ("a", "b"), INPUTS, 1, None)


@pytest.mark.parametrize(
    ("near", "far", "waited_us", "total_s", "hops_s", "waits_s"),
    [
        (2, 0, 2_000, 1.0, (0.001, 0.001), (0.002, 0.002)),
        (0, 2, 2_000, 0.084, (0.02, 0.02), (0.002, 0.002)),  # twice there, and once back
        (1, 1, 2_000, 0.065, (0.001, 0.02), (0.002, 0.002)),
        (0, 2, 2_000_000_000, 0.030, (0.0, 0.0), (0.010, 0.0)),  # a clock that was set anew
    ],
)
def test_travel_between_hosts_is_what_no_stage_accounts_for(
    near: int, far: int, waited_us: int, total_s: float, hops_s: tuple[float, ...], waits_s: tuple[float, ...]
) -> None:
    stages = [
        StageTimes(received_bytes=1, hop_us=hop_us, wait_us=waited_us, compute_us=10_000, codec_us=0)
        for hop_us in [1_000] * near + [None] * far
    ]
    hops, waits = zip(*_delays(stages, total_s), strict=True)
    assert hops == pytest.approx(hops_s)
    assert waits == pytest.approx(waits_s)

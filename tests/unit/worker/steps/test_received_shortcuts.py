"""What other stages send a step straight is kept until the step comes, within bounds that no peer can exceed."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.steps import ShortcutTensors
from lingualinked.worker.steps import received_shortcuts
from lingualinked.worker.steps.received_shortcuts import ReceivedShortcuts
from message_examples import example

NAMES = ("layer 0", "layer 1")
BASE = msgspec.structs.replace(example(ShortcutTensors), source=0, session=1, number=0, names=("layer 0",))


def message(**fields: object) -> ShortcutTensors:
    return msgspec.structs.replace(BASE, **fields)


def tensor(num_bytes: int = 8) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_a_step_has_what_all_its_sources_have_sent() -> None:
    received, own = ReceivedShortcuts({0: "a", 1: "b"}, NAMES), tensor()
    assert received.receive(message(), (own,)) == {1}
    assert not received.are_complete(1, 0)
    received.receive(message(source=1, names=()), ())
    assert received.are_complete(1, 0)
    assert received.remove(1, 0)["layer 0"] is own
    assert not received.are_complete(1, 0)


def test_what_comes_after_the_end_of_a_session_is_not_kept() -> None:
    received = ReceivedShortcuts({0: "a"}, NAMES)
    received.receive(message(), (tensor(),))
    received.end_session(1, may_return=True)
    assert received.receive(message(), (tensor(),)) == {1}
    received.end_session(1)
    assert not received.receive(message(number=1), (tensor(),))
    assert not received.are_complete(1, 1)


def test_a_step_whose_tensors_had_to_be_dropped_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_shortcuts, "_MOST_BYTES", 20)
    received = ReceivedShortcuts({0: "a", 1: "b"}, NAMES)
    received.receive(message(), (tensor(),))
    received.receive(message(session=2), (tensor(),))
    assert received.receive(message(session=3), (tensor(),)) == {1, 3}
    assert received.are_complete(1, 0)  # so that it can fail
    assert not received.receive(message(source=1), (tensor(),))
    with pytest.raises(ProtocolError, match="step 0 of session 1 were dropped"):
        received.remove(1, 0)
    assert received.receive(message(session=2, source=1, names=("layer 1",)), (tensor(4),)) == {2}
    assert set(received.remove(2, 0)) == {"layer 0", "layer 1"}
    assert received.receive(message(session=4), (tensor(12),)) == {4}


def test_a_peer_can_not_fill_a_worker_with_steps_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_shortcuts, "_MOST_STEPS", 3)
    received = ReceivedShortcuts({0: "a"}, NAMES)
    for number in range(9):
        received.receive(message(number=number, names=()), ())
    assert len(received._held) == 3


@pytest.mark.parametrize(("names", "num_tensors"), [(("a",), 2), (("a", "a"), 2), ((), 1)])
def test_what_is_not_as_announced_is_refused(names: tuple[str, ...], num_tensors: int) -> None:
    with pytest.raises(ProtocolError, match="arrived for"):
        ReceivedShortcuts({0: "a"}, NAMES).receive(message(names=names), (tensor(),) * num_tensors)


def test_nobody_sends_twice() -> None:
    received = ReceivedShortcuts({0: "a"}, NAMES)
    received.receive(message(), (tensor(),))
    with pytest.raises(ProtocolError, match="once too often"):
        received.receive(message(), (tensor(),))

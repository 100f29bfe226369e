"""A worker's messages wait in order, senders take turns, and none of them fills the memory or holds up the others."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import torch

from lingualinked.errors import ProtocolError
from lingualinked.protocol.boot import Emulation
from lingualinked.protocol.measuring import Ping, Pong
from lingualinked.protocol.messages import CutLinks, EmulateDevice, InspectWorker, UnloadModel, encode
from lingualinked.protocol.moving import KeepPlan, KVReceived
from lingualinked.protocol.steps import EndSession, Step, StepGroup
from lingualinked.transport.hosts import cut_links
from lingualinked.transport.inprocess import InProcessHub, InProcessMailbox
from lingualinked.worker.messaging.inbox import Inbox
from unit.worker.stages.test_hosted_stage import STEP

Message = (
    InspectWorker
    | CutLinks
    | EmulateDevice
    | UnloadModel
    | KeepPlan
    | EndSession
    | StepGroup
    | KVReceived
    | Pong
    | Ping
)


def check(message: object, sender: str) -> None:
    if isinstance(message, InspectWorker) and sender != "caller":
        raise ProtocolError("not yours")


class Line:
    """An inbox, and mailboxes of others that send to it."""

    def __init__(self) -> None:
        hub = InProcessHub()
        self.mailbox = InProcessMailbox(hub, "worker")
        self.others = {name: InProcessMailbox(hub, name) for name in ("caller", "a", "b")}
        for other in self.others.values():
            other.connect("worker", self.mailbox.address, self.mailbox.public_key)
        self.inbox = Inbox(self.mailbox, check)

    def say(self, sender: str, message: Message, *tensors: torch.Tensor) -> None:
        self.others[sender].send("worker", encode(message), tensors)

    def next(self) -> tuple[str, Message]:
        waiting = self.inbox.next_message()
        assert waiting is not None
        return waiting[1].sender, waiting[0]  # type: ignore[return-value]

    @property
    def num_untaken(self) -> int:
        return self.mailbox._queue.qsize()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    for mailbox in (line.mailbox, *line.others.values()):
        mailbox.close()


def end(session: int) -> EndSession:
    return EndSession(model=1, plan_version=1, stage=0, session=session)


def test_each_senders_messages_keep_their_order(line: Line) -> None:
    for session in range(5):
        line.say("caller", end(session))
        line.say("a", end(10 + session))
    heard = [line.next() for _ in range(10)]
    assert [message for sender, message in heard if sender == "caller"] == [end(session) for session in range(5)]
    assert [message for sender, message in heard if sender == "a"] == [end(10 + session) for session in range(5)]


def test_what_moves_a_model_comes_first(line: Line) -> None:
    line.say("caller", end(1))
    line.say("a", KVReceived(request=1, accepted=True))
    line.say("caller", KeepPlan(model=1, plan_version=2))
    assert {type(line.next()[1]) for _ in range(2)} == {KVReceived, KeepPlan}
    assert line.next() == ("caller", end(1))


def test_whose_turn_it_is(line: Line) -> None:
    for number in range(500):
        line.say("a", Pong(number=number))
    line.say("caller", InspectWorker(request=1))
    line.say("b", end(1))
    assert {line.next()[0] for _ in range(3)} == {"a", "b", "caller"}


def test_no_more_than_so_many_of_one_sender_wait_here_and_none_is_lost(line: Line) -> None:
    for number in range(3_000):
        line.say("a", Pong(number=number))
    assert line.next() == ("a", Pong(number=0))
    assert line.num_untaken == 2_000
    assert [line.next()[1] for _ in range(2_999)] == [Pong(number=number) for number in range(1, 3_000)]


def test_no_more_than_so_many_bytes_of_one_sender_wait_here(line: Line) -> None:
    large = torch.zeros(24 << 20, dtype=torch.uint8)
    for number in range(5):
        line.say("a", Ping(number=number), large)
    line.next()
    assert line.num_untaken == 2


def test_what_is_refused_is_counted(line: Line) -> None:
    line.others["a"].send("worker", b"no message")
    line.say("a", InspectWorker(request=1))
    line.say("a", Pong(number=1))
    heard = [line.inbox.next_message() for _ in range(3)]
    assert [waiting and waiting[0] for waiting in heard] == [None, None, Pong(number=1)]
    assert line.mailbox.num_refused == 2


def test_a_flood_of_what_is_refused_holds_up_nobody(line: Line) -> None:
    def check_and_be_sent_more(message: object, sender: str) -> None:
        if isinstance(message, InspectWorker):
            line.say("a", message)
        check(message, sender)

    line.inbox = Inbox(line.mailbox, check_and_be_sent_more)
    line.say("a", InspectWorker(request=1))
    line.say("caller", end(1))
    while (waiting := line.inbox.next_message()) is None:
        pass
    assert waiting[0] == end(1)
    assert line.mailbox.num_refused < 5


def test_what_comes_over_a_link_that_is_cut_waits_until_it_is_restored(line: Line) -> None:
    line.inbox.cut_links(["a", "caller"])
    emulation = Emulation(slowdown=1.0, links=(), delayed_from=())
    line.say("a", end(1))
    line.say("a", end(2))
    line.say("caller", InspectWorker(request=1))
    line.say("b", end(3))
    line.say("caller", CutLinks(request=2, senders=()))
    line.say("caller", EmulateDevice(request=3, emulation=emulation))
    passed = [line.next() for _ in range(3)]
    assert ("b", end(3)) in passed
    assert [each for each in passed if each[0] == "caller"] == [
        ("caller", CutLinks(request=2, senders=())),
        ("caller", EmulateDevice(request=3, emulation=emulation)),
    ]
    line.inbox.cut_links(["caller"])
    line.say("a", end(4))
    assert [line.next() for _ in range(3)] == [("a", end(number)) for number in (1, 2, 4)]
    line.inbox.cut_links([])
    assert line.next() == ("caller", InspectWorker(request=1))


def test_a_cut_link_holds_so_many_bytes(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_links, "MAX_HELD_BYTES", 100)
    line.inbox.cut_links(["a"])
    line.say("a", end(1))
    line.say("a", end(2), torch.zeros(100))
    line.say("a", end(3))
    line.say("b", end(4))
    assert line.next() == ("b", end(4))
    line.inbox.cut_links([])
    assert [line.next() for _ in range(2)] == [("a", end(1)), ("a", end(3))]
    assert line.mailbox.num_refused == 1


def test_the_steps_of_a_group_wait_as_if_each_had_come_by_itself(line: Line) -> None:
    steps = tuple(msgspec.structs.replace(STEP, session=session) for session in (1, 2, 3))
    line.say("a", StepGroup(steps=steps), torch.tensor([[7], [8], [9]]))
    line.say("a", end(4))
    found = [line.inbox.next_message() for _ in range(4)]
    assert [waiting[0] for waiting in found if waiting is not None] == [*steps, end(4)]
    assert [waiting[1].tensors[0].tolist() for waiting in found[:3] if waiting is not None] == [[[7]], [[8]], [[9]]]


def test_a_step_of_a_group_that_its_sender_may_not_send_costs_the_others_nothing(line: Line) -> None:
    def check_step(message: object, _: str) -> None:
        if isinstance(message, Step) and message.session == 2:
            raise ProtocolError("not yours")

    line.inbox._check_sender = check_step
    steps = tuple(msgspec.structs.replace(STEP, session=session) for session in (1, 2, 3))
    line.say("a", StepGroup(steps=steps), torch.tensor([[7], [8], [9]]))
    assert [line.next()[1], line.next()[1]] == [steps[0], steps[2]]
    assert line.mailbox.num_refused == 1


def test_others_are_taken_up_to_the_first_that_is_not_accepted(line: Line) -> None:
    for sender, session in (("a", 0), ("a", 1), ("a", -1), ("a", 2), ("b", 3), ("b", 4)):
        line.say(sender, end(session))
    assert line.next() == ("a", end(0))
    taken = line.inbox.take_others(lambda message, _: message.session > 0, 2)  # type: ignore[union-attr]
    assert len(taken) == 2
    assert sorted(message.session for message, _ in taken) in ([1, 3], [3, 4])  # type: ignore[union-attr]
    rest = line.inbox.take_others(lambda message, _: message.session > 0, 9)  # type: ignore[union-attr]
    assert len(rest) == 1
    assert [line.next()[1], line.next()[1]] == [end(-1), end(2)]

"""The caller's end of the conversation, with mailboxes that carry no further than this process."""

from __future__ import annotations

import gc
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import msgspec
import pytest
import torch

from lingualinked.cluster.messaging.exchange import Exchange
from lingualinked.cluster.messaging.pending import Pending
from lingualinked.cluster.messaging.reach import Reach
from lingualinked.cluster.steps.step_reply import StepReply
from lingualinked.errors import (
    ArgumentError,
    CheckpointError,
    ClosedError,
    DeviceMemoryError,
    ProtocolError,
    ResourceError,
    WorkerDiedError,
    WorkerError,
)
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.hooks.hook_data import Entries, Items, Plain
from lingualinked.model.process.environment_probe import read_environment
from lingualinked.protocol.failures import FailureKind, KVRefused, RequestFailed, StepFailed
from lingualinked.protocol.hooking import HookAnswered, HookReached
from lingualinked.protocol.messages import (
    Acknowledged,
    AnyMessage,
    DismissWorker,
    Hello,
    InspectWorker,
    IntroduceWorker,
    LogRecord,
    Progress,
    StageLoaded,
    UnloadModel,
    decode,
    encode,
)
from lingualinked.protocol.moving import KVCopied
from lingualinked.protocol.packed import PackedDone, PackedFailed
from lingualinked.protocol.roles import ANSWERS, TO_CALLER, Role
from lingualinked.protocol.running import TokensChosen
from lingualinked.protocol.steps import EndSession, StageTimes, Step, StepDone, StepRecorded
from lingualinked.protocol.weights import FetchPart
from lingualinked.rounding import Rounding
from lingualinked.transport.inprocess import InProcessHub, InProcessMailbox
from lingualinked.transport.keys.keys import generate_keypair
from message_examples import TYPES, example


class Conversation:
    """An exchange and the mailboxes of its two workers."""

    def __init__(self) -> None:
        self.hub = hub = InProcessHub()
        self.keys = {name: generate_keypair() for name in ("first", "second")}
        self.caller = InProcessMailbox(hub, "caller")
        self.workers = {name: InProcessMailbox(hub, name) for name in "ab"}
        self.exchange = Exchange(self.caller, self.workers, lambda command: command(), Reach("here"))
        for name, worker in self.workers.items():
            self.exchange.authorise_worker(name, worker.public_key)
            worker.connect("caller", self.caller.address, self.caller.public_key)

    def say(self, sender: str, message: AnyMessage, *tensors: torch.Tensor) -> None:
        self.workers[sender].send("caller", encode(message), tensors)
        self.exchange.handle_next(0)

    def greet(self, *names: str) -> None:
        for name in names:
            self.say(name, Hello(pid=1, address=self.workers[name].address, environment=HERE))
        for name in self.workers:
            while isinstance(introduction := self.heard(name), IntroduceWorker):
                self.say(name, Acknowledged(request=introduction.request))

    def heard(self, name: str) -> AnyMessage | None:
        delivery = self.workers[name].receive(0)
        return None if delivery is None else decode(delivery.payload)

    def ask(
        self,
        message: Step | InspectWorker,
        devices: Sequence[str] = "ab",
        model: int = 1,
        part_senders: Sequence[str] = "",
        takes_hooks: bool = False,
    ) -> Future[object]:
        pending = Pending(
            devices=frozenset(devices),
            asked=devices[-1],
            answer=ANSWERS[type(message)],
            model=model,
            what="this",
            timeout_s=60,
            deadline=time.monotonic() + 60,
            part_senders=tuple(part_senders),
            takes_hooks=takes_hooks,
        )
        key = (
            ("step", message.session, message.number) if isinstance(message, Step) else ("request", message.request, 0)
        )
        self.exchange.send_request(devices[0], message, (), key, pending)
        return pending.future


@pytest.fixture
def talk() -> Iterator[Conversation]:
    conversation = Conversation()
    conversation.greet("a", "b")
    yield conversation
    conversation.exchange.close()
    for worker in conversation.workers.values():
        worker.close()


def step(session: int = 1, *, model: int = 1, logits_to_keep: int | None = 1) -> Step:
    return Step(
        model=model,
        plan_version=1,
        stage=0,
        session=session,
        number=0,
        keeps_kv=True,
        layout=None,
        mask=MaskMode.NONE,
        positions=PositionMode.NONE,
        position_rows=0,
        logits_to_keep=logits_to_keep,
        edits=(),
        rope_reach=0,
        sent_us=0,
        timings=(),
    )


def test_a_worker_is_there_once_it_says_hello() -> None:
    conversation = Conversation()
    assert not conversation.exchange.settled["a"].is_set()
    conversation.exchange.unload_model(7)  # nobody to tell
    conversation.greet("a")
    assert conversation.exchange.settled["a"].is_set()
    assert not conversation.exchange.settled["b"].is_set()
    assert conversation.heard("a") is None
    conversation.exchange.close()
    assert conversation.exchange.settled["b"].is_set()


def test_a_step_goes_to_the_first_stage_and_its_answer_comes_from_the_last(talk: Conversation) -> None:
    future = talk.ask(step())
    assert talk.heard("a") == step()
    times = StageTimes(received_bytes=1, hop_us=2, wait_us=3, compute_us=4, codec_us=5)
    talk.say("b", StepDone(model=1, session=1, number=0, timings=(times, times)), torch.ones(2))
    reply = future.result(0)
    assert isinstance(reply, StepReply)
    assert reply.timings == (times, times)
    assert reply.num_bytes > 8
    assert torch.equal(reply.tensors[0], torch.ones(2))


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (FailureKind.ERROR, WorkerError, "worker on device 'a' raised ValueError: no"),
        (FailureKind.MEMORY, DeviceMemoryError, "worker on device 'a' raised ValueError: no"),
        (FailureKind.CHECKPOINT, CheckpointError, "device 'a': no"),
        (FailureKind.ARGUMENT, ArgumentError, "device 'a': no"),
        (FailureKind.RESOURCE, ResourceError, "device 'a': no"),
    ],
)
def test_a_failure_is_the_error_of_its_kind_with_the_remote_traceback(
    talk: Conversation, kind: FailureKind, error: type[Exception], words: str
) -> None:
    future = talk.ask(InspectWorker(request=3), "a")
    talk.say("a", RequestFailed(request=3, kind=kind, cause="ValueError: no", traceback="line 1"))
    with pytest.raises(error, match=words) as caught:
        future.result(0)
    raised = caught.value if isinstance(caught.value, WorkerError) else caught.value.__cause__
    assert isinstance(raised, WorkerError)
    assert (raised.device, raised.remote_traceback) == ("a", "line 1")


def test_a_failed_step_fails_alone(talk: Conversation) -> None:
    first, second = talk.ask(step(1)), talk.ask(step(2))
    talk.say("b", StepFailed(model=1, session=1, number=0, kind=FailureKind.ERROR, cause="E: x", traceback=""))
    assert isinstance(first.exception(0), WorkerError)
    assert not second.done()


def recorded(stage: int, *, model: int = 1, layouts: tuple[tuple[bool, ...], ...] = ((),)) -> StepRecorded:
    return StepRecorded(model=model, session=1, number=0, stage=stage, layouts=layouts)


HERE = read_environment()
DONE = StepDone(model=1, session=1, number=0, timings=())
FAILED = StepFailed(model=1, session=1, number=0, kind=FailureKind.ERROR, cause="E: x", traceback="")


def test_a_step_that_records_is_done_once_all_its_parts_are_there(talk: Conversation) -> None:
    for order in itertools.permutations(("a", "b", "done")):
        future = talk.ask(step(1), part_senders="ab")
        for each in order:
            assert not future.done()
            talk.say("b" if each == "done" else each, DONE if each == "done" else recorded("ab".index(each)))
        assert set(future.result(0).parts) == {0, 1}
        assert not talk.exchange._pending._pending
    assert talk.caller.num_refused == 0


def test_what_was_not_to_be_recorded_is_refused(talk: Conversation) -> None:
    for senders, stage in (("", 0), ("ab", 2), ("ab", -1), ("ab", 1), ("ba", 0)):
        future = talk.ask(step(1), part_senders=senders)
        refused = talk.caller.num_refused
        talk.say("a", recorded(stage))
        assert talk.caller.num_refused == refused + 1
        talk.say("b", FAILED)
        assert future.exception(0) is not None


def test_a_part_comes_once_and_is_not_replaced(talk: Conversation) -> None:
    future = talk.ask(step(1), part_senders="ab")
    first, second = torch.zeros(1), torch.ones(1)
    for tensor in (first, second):
        talk.say("a", recorded(0, layouts=((True,),)), tensor)
    assert talk.caller.num_refused == 1
    talk.say("b", recorded(1))
    talk.say("b", DONE)
    assert torch.equal(future.result(0).parts[0].tensors[0], first)


@pytest.mark.parametrize("is_done", [False, True], ids=["in the middle", "after the answer"])
def test_a_worker_that_dies_between_parts_fails_the_step_at_once(talk: Conversation, is_done: bool) -> None:
    """Here b, which is the last stage too: its answer may be there without what the first stage recorded."""
    future = talk.ask(step(1), part_senders="ab")
    talk.say("b", recorded(1))
    if is_done:
        talk.say("b", DONE)
    talk.exchange.mark_dead("a", "killed")
    with pytest.raises(WorkerDiedError, match=r"'a' died.*killed"):
        future.result(0)
    assert not talk.exchange._pending._pending
    talk.say("b", DONE)
    assert talk.caller.num_refused == 0


def test_a_step_that_fails_between_parts_drops_them(talk: Conversation) -> None:
    future = talk.ask(step(1), part_senders="ab")
    talk.say("a", recorded(0))
    talk.say("b", FAILED)
    assert isinstance(future.exception(0), WorkerError)
    assert not talk.exchange._pending._pending
    talk.say("b", recorded(1))
    assert not talk.exchange._pending._pending


REACHED = HookReached(
    model=1,
    session=1,
    number=0,
    stage=1,
    path="mlp",
    is_done=True,
    args=Items(False, ()),
    kwargs=Entries("", (), ()),
    output=Plain(None),
    strides=(),
)
ANSWERED = HookAnswered(model=1, plan_version=1, stage=1, session=1, number=0, goes_on=True)


def test_what_was_recorded_before_a_step_stopped_may_arrive_afterwards(talk: Conversation) -> None:
    future = talk.ask(step(1), part_senders="ab", takes_hooks=True)
    talk.say("b", REACHED)
    _, rest = future.result(0)
    talk.say("a", recorded(0))
    assert talk.caller.num_refused == 0
    talk.say("b", DONE)
    talk.say("b", REACHED)
    assert talk.caller.num_refused == 2  # the step waits for its hooks
    talk.exchange.answer_hooks("b", ANSWERED, ())
    talk.say("b", recorded(1))
    talk.say("b", DONE)
    assert set(rest.result(0).parts) == {0, 1}


def test_a_step_that_has_its_answer_stops_nowhere(talk: Conversation) -> None:
    talk.ask(step(1), part_senders="ab", takes_hooks=True)
    talk.say("b", DONE)
    talk.say("a", REACHED)
    assert talk.caller.num_refused == 1


def test_a_step_that_waits_for_hooks_ends_once_nobody_awaits_it(talk: Conversation) -> None:
    ending = msgspec.structs.replace(ANSWERED, plan_version=0, goes_on=False)
    # 1) it stops too late
    talk.say("b", REACHED)
    assert talk.heard("b") == ending
    # 2) it fails while its hooks run
    future = talk.ask(step(1), takes_hooks=True)
    talk.say("b", REACHED)
    _, rest = future.result(0)
    talk.say("a", FAILED)
    assert isinstance(rest.exception(0), WorkerError)
    talk.exchange.answer_hooks("b", ANSWERED, ())
    assert talk.heard("b") == ending


def test_a_session_that_ends_is_freed_beyond_a_dead_worker_and_its_step_fails(talk: Conversation) -> None:
    end = EndSession(model=1, plan_version=1, stage=0, session=1)
    future, other = talk.ask(step(1), takes_hooks=True), talk.ask(step(2))
    talk.exchange.end_session("ab", end)
    with pytest.raises(ClosedError, match="ended during a step"):
        future.result(0)
    assert not other.done()
    assert [talk.heard(name) for name in "aaab"] == [step(1), step(2), end, None]  # a tells b
    talk.exchange.mark_dead("a", "killed")
    talk.exchange.end_session("ab", end)
    assert talk.heard("b") == msgspec.structs.replace(end, stage=1)


def test_a_dead_worker_fails_what_needs_it_now_and_later(talk: Conversation) -> None:
    both, alone = talk.ask(step(1)), talk.ask(step(2), "a")
    talk.exchange.mark_dead("b", "killed")
    with pytest.raises(WorkerDiedError, match=r"'b' died.*killed"):
        both.result(0)
    assert not alone.done()
    with pytest.raises(WorkerDiedError, match=r"'b' died"):
        talk.ask(step(3)).result(0)
    talk.exchange.send_command("b", EndSession(model=1, plan_version=1, stage=0, session=1), 1)
    assert talk.heard("b") is None


def test_a_request_that_fails_at_once_is_freed_with_its_error(talk: Conversation) -> None:
    talk.exchange.mark_dead("b", "killed")
    gc.collect()
    gc.disable()
    try:
        future = talk.ask(InspectWorker(request=5), "b")
        freed = weakref.ref(future)
        with pytest.raises(WorkerDiedError):
            future.result(0)
        del future
        assert freed() is None
    finally:
        gc.enable()


def test_a_device_may_come_later_and_go_again(talk: Conversation, caplog: pytest.LogCaptureFixture) -> None:
    late = talk.workers["late"] = InProcessMailbox(talk.hub, "late")
    late.connect("caller", talk.caller.address, talk.caller.public_key)
    talk.greet("late")  # nobody expects it
    assert "late" not in talk.exchange.addresses
    talk.exchange.authorise_worker("late", late.public_key)  # of one that nobody waits for any more
    assert "late" not in talk.exchange.public_keys
    talk.exchange.expect_worker("late")
    talk.exchange.authorise_worker("late", late.public_key)
    settled = talk.exchange.settled["late"]
    assert not settled.is_set()
    talk.greet("late")
    assert settled.is_set()
    future = talk.ask(InspectWorker(request=1), devices=["late"])
    assert talk.heard("late") == InspectWorker(request=1)
    for _ in range(2):
        talk.exchange.drop_worker("late")
    with pytest.raises(WorkerDiedError, match="'late' died"):
        future.result(0)
    talk.greet("late")
    talk.exchange.mark_dead("late", "killed")
    assert not {"late"} & {*talk.exchange.addresses, *talk.exchange.ended, *talk.exchange.settled}
    assert caplog.records == []


def test_a_device_that_failed_may_come_again_with_another_key(talk: Conversation) -> None:
    talk.exchange.expect_worker("late")
    talk.exchange.authorise_worker("late", talk.keys["first"].public)
    talk.exchange.mark_dead("late", "killed")
    assert "late" in talk.exchange.ended
    talk.exchange.drop_worker("late")
    talk.exchange.expect_worker("late")
    talk.exchange.authorise_worker("late", talk.keys["second"].public)
    assert "late" not in talk.exchange.ended
    assert not talk.exchange.settled["late"].is_set()
    assert talk.exchange.public_keys["late"] == talk.keys["second"].public


def test_a_model_that_is_unloaded_fails_what_waits_and_what_comes(talk: Conversation) -> None:
    ours, other = talk.ask(step(1)), talk.ask(step(2, model=2), model=2)
    talk.exchange.unload_model(1)
    with pytest.raises(ClosedError, match="closed while it was in use"):
        ours.result(0)
    assert not other.done()
    with pytest.raises(ClosedError, match="is closed"):
        talk.ask(step(3)).result(0)
    talk.exchange.send_command(
        "a", EndSession(model=1, plan_version=1, stage=0, session=1), 1
    )  # a handle on KV that outlived the model
    assert [talk.heard("a") for _ in range(4)] == [
        step(1),
        step(2, model=2),
        UnloadModel(model=1),
        None,
    ]
    assert talk.heard("b") == UnloadModel(model=1)


def test_a_field_of_a_wrong_type_fails_here_and_is_not_sent(talk: Conversation) -> None:
    with pytest.raises(ProtocolError, match="int"):
        talk.ask(step(logits_to_keep=1.5)).result(0)  # type: ignore[arg-type]
    assert talk.heard("a") is None


def test_closing_fails_everything(talk: Conversation) -> None:
    future = talk.ask(step())
    talk.exchange.close()
    with pytest.raises(ClosedError):
        future.result(0)


def test_log_records_carry_the_device(talk: Conversation, caplog: pytest.LogCaptureFixture) -> None:
    talk.say("a", LogRecord(level=logging.WARNING, logger="lingualinked.worker", text="hot"))
    talk.say("b", LogRecord(level=logging.ERROR, logger="py.warnings", text="100 % old"))
    assert [(record.name, record.levelname, record.getMessage(), record.device) for record in caplog.records] == [
        ("lingualinked.worker", "WARNING", "[a] hot", "a"),
        ("lingualinked.worker", "ERROR", "[b] 100 % old", "b"),
    ]


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x92\x01\x02", encode(InspectWorker(request=1))])
def test_what_is_no_message_for_the_caller_is_refused(
    talk: Conversation, caplog: pytest.LogCaptureFixture, payload: bytes
) -> None:
    future = talk.ask(step())
    talk.workers["a"].send("caller", payload)
    talk.exchange.handle_next(0)
    assert "mailbox 'caller' refused input from a (" in caplog.text
    assert talk.caller.num_refused == 1
    assert not future.done()


def test_a_progress_bar_that_raises_stops_nothing(talk: Conversation, caplog: pytest.LogCaptureFixture) -> None:
    def draw(num_bytes: int) -> None:
        raise BrokenPipeError

    pending = Pending(
        devices=frozenset("a"),
        asked="a",
        answer=StageLoaded,
        model=1,
        what="this",
        timeout_s=60,
        deadline=time.monotonic() + 60,
        on_progress=draw,
    )
    talk.exchange.send_request("a", InspectWorker(request=5), (), ("request", 5, 0), pending)
    talk.say("a", Progress(request=5, num_done=3))
    assert "BrokenPipeError" in caplog.text
    talk.say("a", StageLoaded(request=5, weight_bytes=3, num_bytes_read=3, rounding=Rounding("a", 1)))
    assert pending.future.done()


SENDERS = {
    Role.WORKER: {"a", "b", "bystander"},
    Role.ASKED: {"a"},
    Role.KV_ENDS: {"a", "b"},
    Role.ANY_STAGE: {"a", "b"},
    Role.LAST_STAGE: {"b"},
    Role.FILE_BORROWER: {"a"},
}


@pytest.mark.parametrize("sender", ["a", "b", "bystander"])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_each_answer_is_taken_from_whose_it_is_to_give_alone(
    talk: Conversation, kind: type[AnyMessage], sender: str
) -> None:
    """A step goes from a to b, KV is copied from a to b, whatever else is asked for is a's to answer."""
    talk.workers["bystander"] = other = InProcessMailbox(talk.hub, "bystander")
    other.connect("caller", talk.caller.address, talk.caller.public_key)
    talk.exchange.expect_worker("bystander")
    talk.exchange.authorise_worker("bystander", other.public_key)
    if kind is not Hello:
        talk.greet("bystander")
    role, message = TO_CALLER.get(kind), example(kind)
    is_packed = kind in (PackedDone, PackedFailed)
    is_step = is_packed or kind in (StepDone, StepFailed, StepRecorded, HookReached, TokensChosen)
    of_step = PackedDone if is_packed else StepDone
    answer = (
        kind if kind in ANSWERS.values() else KVCopied if kind is KVRefused else of_step if is_step else StageLoaded
    )
    pending = Pending(
        devices=frozenset("ab") if is_step or answer is KVCopied else frozenset("a"),
        asked="b" if is_step else "a",
        answer=answer,
        model=7,
        what="this",
        timeout_s=60,
        deadline=time.monotonic() + 60,
        part_senders=(sender,) * 8 if kind is StepRecorded and sender in "ab" else (),
        takes_hooks=kind is HookReached,
        on_tokens=lambda _: False,
    )
    answered = pending.future  # a pause completes it, and makes another one
    key = (
        ("run", 7, 0)
        if kind is TokensChosen
        else ("packed", 7, 0)
        if is_packed
        else ("step", 7, 7)
        if is_step
        else ("request", 7, 0)
    )
    talk.exchange.send_request("a", InspectWorker(request=7), (), key, pending)
    before = talk.caller.num_refused
    talk.say(sender, message)
    if role is None or (kind is Hello and sender != "bystander"):
        assert talk.caller.num_refused == before + 1
    elif kind is not Hello:
        assert (talk.caller.num_refused == before) is (sender in SENDERS[role])
    assert bool(pending.parts) is (kind is StepRecorded and sender in SENDERS[Role.ANY_STAGE])
    if role in (None, Role.WORKER) or sender not in SENDERS[role] or kind in (Progress, StepRecorded, FetchPart):
        assert not answered.done()
    else:
        assert answered.done()


@pytest.mark.parametrize("kind", ANSWERS.values(), ids=lambda kind: kind.__name__)
def test_an_answer_to_something_else_is_none(talk: Conversation, kind: type[AnyMessage]) -> None:
    key = {StepDone: ("step", 7, 7), PackedDone: ("packed", 7, 0), TokensChosen: ("run", 7, 0)}.get(
        kind, ("request", 7, 0)
    )
    pending = Pending(
        devices=frozenset("a"), asked="a", answer=Hello, model=7, what="", timeout_s=60, deadline=time.monotonic() + 60
    )
    talk.exchange.send_request("a", InspectWorker(request=7), (), key, pending)
    talk.say("a", example(kind))
    assert talk.caller.num_refused == 1
    assert not pending.future.done()


@pytest.mark.parametrize("kind", [StepDone, StepFailed, KVCopied, KVRefused], ids=lambda kind: kind.__name__)
def test_an_answer_about_another_model_is_none(talk: Conversation, kind: type[AnyMessage]) -> None:
    is_step = kind in (StepDone, StepFailed)
    answer = StepDone if is_step else KVCopied
    pending = Pending(
        devices=frozenset("a"), asked="a", answer=answer, model=1, what="", timeout_s=60, deadline=time.monotonic() + 60
    )
    talk.exchange.send_request(
        "a", InspectWorker(request=7), (), ("step", 7, 7) if is_step else ("request", 7, 0), pending
    )
    talk.say("a", example(kind))
    assert talk.caller.num_refused == 1
    assert not pending.future.done()


def test_workers_are_introduced_to_each_other_once_and_are_ready_then() -> None:
    conversation = Conversation()
    for name in "ab":
        conversation.say(name, Hello(pid=1, address=conversation.workers[name].address, environment=HERE))
    assert not conversation.exchange.settled["b"].is_set()
    for name, about in (("a", "b"), ("b", "a")):
        introduction = conversation.heard(name)
        other = conversation.workers[about]
        assert isinstance(introduction, IntroduceWorker)
        assert (introduction.name, introduction.public_key, introduction.address) == (
            about,
            other.public_key,
            other.address,
        )
        assert not conversation.exchange.settled["b"].is_set()
        conversation.say(name, Acknowledged(request=introduction.request))
    assert conversation.exchange.settled["b"].is_set()
    conversation.exchange.close()


def test_who_dies_before_it_is_introduced_holds_nobody_up() -> None:
    conversation = Conversation()
    for name in "ab":
        conversation.say(name, Hello(pid=1, address=conversation.workers[name].address, environment=HERE))
    introduction = conversation.heard("b")
    assert isinstance(introduction, IntroduceWorker)
    conversation.say("b", Acknowledged(request=introduction.request))
    conversation.exchange.mark_dead("a", "killed")
    assert conversation.exchange.settled["b"].is_set()
    conversation.exchange.close()


def test_the_end_of_an_introduction_does_not_count_for_another_device_of_that_name(talk: Conversation) -> None:
    late = talk.workers["late"] = InProcessMailbox(talk.hub, "late")
    late.connect("caller", talk.caller.address, talk.caller.public_key)
    ready: list[Callable[[Exception | None], None]] = []
    talk.exchange.introductions.introduce = lambda _, on_ready: ready.append(on_ready)  # type: ignore[method-assign]
    talk.exchange.expect_worker("late")
    talk.exchange.authorise_worker("late", late.public_key)
    talk.greet("late")
    talk.exchange.drop_worker("late")
    talk.exchange.expect_worker("late")
    ready[0](ValueError("of the one before"))
    assert not talk.exchange.settled["late"].is_set()
    assert talk.exchange.failed == {}


def test_a_device_that_is_forgotten_is_forgotten_by_all(talk: Conversation) -> None:
    talk.exchange.drop_worker("b")
    assert talk.heard("a") == DismissWorker(name="b")


@pytest.mark.parametrize("address", ["udp://1.2.3.4:5", "pgm://x", "", "inproc://x"])
def test_a_hello_from_nowhere_is_refused_and_not_waited_for_again(address: str) -> None:
    conversation = Conversation()
    conversation.say("a", Hello(pid=1, address=address, environment=HERE))
    assert conversation.caller.num_refused == 1
    assert conversation.exchange.settled["a"].is_set()
    with pytest.raises(ProtocolError, match="the greeting of device 'a' can't be used"):
        raise conversation.exchange.failed["a"]
    assert not conversation.exchange.addresses
    conversation.exchange.close()

"""Each message to a worker, from every party that may not send it."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lingualinked.errors import ProtocolError
from lingualinked.protocol.base import Message
from lingualinked.protocol.messages import AnyMessage, IntroduceWorker
from lingualinked.protocol.moving import AnnounceMove, FetchWeight, KVChunk, StagePlace
from lingualinked.protocol.roles import TO_CALLER, TO_WORKER, Role
from lingualinked.protocol.steps import EndSession, Step
from lingualinked.protocol.weights import FetchPart, FilePart
from lingualinked.transport.inprocess import InProcessHub, InProcessMailbox
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.worker.background import Background
from lingualinked.worker.kv.announced_moves import AnnouncedMoves
from lingualinked.worker.kv.kv_mover import KVMover
from lingualinked.worker.measuring.probe import LinkProbes
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.messaging.sender_check import SenderCheck, StaleMessageError
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps.received_shortcuts import ReceivedShortcuts
from message_examples import STEP, TYPES, example

MODEL, OLD, NEW, STAGE, REQUEST = 7, 1, 2, 1, 7

# This worker has stage 1 of version 1 and of version 2 of the plan; a move between them is announced.
PARTIES = {
    "caller": {Role.CALLER, Role.WORKER, Role.PREVIOUS},
    "previous": {Role.WORKER, Role.PREVIOUS},
    "next": {Role.WORKER},
    "earlier": {Role.WORKER, Role.EARLIER},
    "runner": {Role.WORKER},  # of sessions in a run, whose first stage is elsewhere
    "source": {Role.WORKER, Role.KV_SOURCE},
    "target": {Role.WORKER, Role.KV_TARGET},
    "borrower": {Role.WORKER, Role.BORROWER},
    "lender": {Role.WORKER, Role.LENDER},
    "file borrower": {Role.WORKER, Role.FILE_BORROWER},
    "file source": {Role.WORKER, Role.FILE_SOURCE},
    "probed": {Role.WORKER, Role.PROBED},
    "bystander": {Role.WORKER},
    "unintroduced": set(),
}


@pytest.fixture
def roles() -> SenderCheck:
    mailbox = InProcessMailbox(InProcessHub(), "me")
    peers = Peers(mailbox)
    for name in PARTIES.keys() - {"caller", "unintroduced"}:
        key = generate_keypair().public
        peers.introduce(IntroduceWorker(request=1, name=name, public_key=key, address="inprocess://"))
    stages = HostedStages("cpu", Background(lambda: None))
    for version in (OLD, NEW):
        hosted: Any = SimpleNamespace(previous_name="previous", stage=SimpleNamespace(start=2, end=4))
        hosted.runner_of = lambda _: "runner"
        hosted.shortcuts = ReceivedShortcuts({0: "earlier"}, ["input_ids"])
        stages._stages[StageKey(MODEL, version, STAGE)] = hosted
    asked: Any = SimpleNamespace(last_asked="lender")
    stages._borrowed[REQUEST] = StageKey(MODEL, NEW, STAGE), asked
    moves = AnnouncedMoves()
    held = [("previous", OLD, 0, 2), ("me", OLD, 2, 4), ("next", OLD, 4, 6)]
    moved = [("previous", NEW, 0, 2), ("source", NEW, 2, 3), ("me", NEW, 3, 4), ("next", NEW, 4, 6)]
    places = tuple(
        StagePlace(name=name, plan_version=at, start=start, end=end) for name, at, start, end in held + moved
    )
    moves.announce(AnnounceMove(request=1, model=MODEL, stages=places, borrowers=("borrower",)))
    mover, probes = KVMover(stages, peers, moves), LinkProbes(peers)
    transfer: Any = SimpleNamespace(request=SimpleNamespace(target_name="target"))
    mover._transfers[REQUEST] = transfer
    probe: Any = None
    probes._waiting["probed"] = deque([probe])
    files: Any = SimpleNamespace(
        borrowers=lambda load: ("file borrower",) if load == REQUEST else (),
        sources=lambda load: ("file source",) if load == REQUEST else (),
    )
    return SenderCheck(peers, stages, mover, moves, probes, files)


def is_taken(roles: SenderCheck, message: Message, sender: str) -> bool:
    try:
        roles.check_sender(message, sender)
    except ProtocolError:
        return False
    return True


def aimed(kind: type[Message], **fields: Any) -> Any:
    """A message about something that the worker has."""
    message = example(kind)  # type: ignore[arg-type]
    known: dict[str, Any] = {"model": MODEL, "plan_version": OLD, "stage": STAGE, "request": REQUEST, "load": REQUEST}
    known |= {"steps": (msgspec.structs.replace(STEP, model=MODEL, plan_version=OLD, stage=STAGE),)} | fields
    return msgspec.structs.replace(
        message, **{name: known[name] for name in known.keys() & set(kind.__struct_fields__)}
    )


def test_the_tables_are_whole() -> None:
    assert TO_WORKER.keys() | TO_CALLER.keys() == set(TYPES)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_each_message_is_taken_from_whose_it_is_to_send_alone(roles: SenderCheck, kind: type[AnyMessage]) -> None:
    taken = {name for name in PARTIES if is_taken(roles, aimed(kind), name)}
    assert taken == {name for name, held in PARTIES.items() if TO_WORKER.get(kind) in held}


@pytest.mark.parametrize("version", [0, 3, 10**9])
@pytest.mark.parametrize("kind", [Step, EndSession])
def test_a_version_that_is_not_hosted_has_no_stage_before_it(
    roles: SenderCheck, kind: type[AnyMessage], version: int
) -> None:
    assert not is_taken(roles, aimed(kind, plan_version=version), "previous")


def test_what_was_on_its_way_when_a_stage_went_is_no_cause_for_alarm(roles: SenderCheck) -> None:
    for stale in (aimed(EndSession, plan_version=9), aimed(KVChunk, model=MODEL + 1), aimed(FetchWeight, model=9)):
        with pytest.raises(StaleMessageError):
            roles.check_sender(stale, "previous")
    with pytest.raises(ProtocolError) as caught:
        roles.check_sender(aimed(EndSession), "next")
    assert not isinstance(caught.value, StaleMessageError)


def test_the_runner_of_a_session_sends_steps_to_the_first_stage_alone(roles: SenderCheck) -> None:
    hosted = roles._parties[Role.PREVIOUS].__self__._stages  # type: ignore[attr-defined]
    hosted[StageKey(MODEL, OLD, 0)] = hosted[StageKey(MODEL, OLD, STAGE)]
    step = aimed(Step, stage=0, runner="runner")
    assert is_taken(roles, step, "runner")
    for other in PARTIES.keys() - {"runner", "caller"}:
        assert not is_taken(roles, step, other)
    assert not is_taken(roles, aimed(Step, stage=0, runner=""), "runner")
    assert not is_taken(roles, aimed(EndSession, stage=0), "runner")


def test_a_step_that_was_on_its_way_when_its_run_ended_is_no_cause_for_alarm(roles: SenderCheck) -> None:
    hosted: Any = roles._parties[Role.PREVIOUS].__self__._stages  # type: ignore[attr-defined]
    hosted[StageKey(MODEL, OLD, 0)] = first = hosted[StageKey(MODEL, OLD, STAGE)]
    first.runner_of = lambda _: ""
    with pytest.raises(StaleMessageError):
        roles.check_sender(aimed(Step, stage=0, runner="runner"), "runner")


def test_each_stage_has_a_party_of_its_own_before_it(roles: SenderCheck) -> None:
    for fields in ({"stage": 0}, {"stage": 2}, {"model": MODEL + 1}):
        assert not is_taken(roles, aimed(Step, **fields), "previous")


def test_kv_comes_from_who_holds_the_layers_under_the_other_version(roles: SenderCheck) -> None:
    assert is_taken(roles, aimed(KVChunk, plan_version=OLD), "source")
    for fields in ({"plan_version": NEW}, {"stage": 0}, {"model": MODEL + 1}, {"plan_version": 9}):
        assert not is_taken(roles, aimed(KVChunk, **fields), "source")


def test_parts_of_files_belong_to_a_load(roles: SenderCheck) -> None:
    assert not is_taken(roles, aimed(FetchPart, load=REQUEST + 1), "file borrower")
    assert not is_taken(roles, aimed(FilePart, load=REQUEST + 1), "file source")


def test_weights_are_lent_of_the_model_that_moves(roles: SenderCheck) -> None:
    assert not is_taken(roles, aimed(FetchWeight, model=MODEL + 1), "borrower")

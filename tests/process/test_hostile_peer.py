"""What a party of the cluster may say that has no part in a model: it costs nobody else a thing, and is counted."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.process.environment_probe import read_environment
from lingualinked.protocol.base import Message
from lingualinked.protocol.failures import FailureKind, RequestFailed, StepFailed
from lingualinked.protocol.measuring import Ping, Pong
from lingualinked.protocol.messages import (
    Hello,
    InspectWorker,
    IntroduceWorker,
    LogRecord,
    WorkerReport,
    decode,
    encode,
)
from lingualinked.protocol.moving import (
    FetchWeight,
    JoinedRows,
    JoinSessions,
    KVChunk,
    KVSlice,
    MoveSession,
    SessionState,
)
from lingualinked.protocol.packed import PackedDone, PackedStep, PackedText
from lingualinked.protocol.roles import TO_CALLER, TO_WORKER
from lingualinked.protocol.running import BeginRun, EndRun, TokensChosen
from lingualinked.protocol.steps import EndSession, KVEdit, KVEditKind, StageTimes, Step, StepDone, StepGroup
from lingualinked.transport.wire.codec import Limits, encode_message
from lingualinked.transport.wire.message_limits import RING_BYTES
from message_examples import TYPES, example
from process.outsiders import Outsider
from waiting import num_sessions, wait_until

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])
Kind = tuple[str, list[list[bytes]]]
"""What it is called, and the messages of it, each as frames."""


@pytest.fixture
def outsider(shared_cluster: ll.Cluster) -> Iterator[Outsider]:
    with Outsider(shared_cluster) as outsider:
        yield outsider


def frames(message: Message | bytes, *tensors: torch.Tensor) -> list[bytes]:
    payload = message if isinstance(message, bytes) else encode(message)  # type: ignore[arg-type]
    return [bytes(frame) for frame in encode_message(payload, tensors, Limits())]


def no_messages() -> Iterator[Kind]:
    """Bytes that are none, beside an envelope that is right; and envelopes that are wrong."""
    step = msgspec.msgpack.decode(encode(example(Step)))  # type: ignore[arg-type]
    payloads = {
        "empty": b"",
        "reserved byte": b"\xc1",
        "no tag": b"\x90",
        "unknown tag": b"\x92\x7f\x01",
        "text that is no UTF-8": b"\x93\x10\x01\xa2\xff\xfe",
        "deep in a surplus field": b"\xdc\x27\x10\x05\x01\x01\x01\x01" + b"\x91" * 9_995,
        "deep": b"\x91" * 100_000,
        "deep maps": b"\x81" * 100_000,
        "four billion items": b"\x94\x08\x01\xa1a\xdd\xff\xff\xff\xff",
        "four billion bytes": b"\xc6\xff\xff\xff\xff",
        "a number beyond 64 bits": b"\x92\x03\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
        "a Step that ends early": encode(example(Step))[:9],  # type: ignore[arg-type]
        "a Step with text as number": msgspec.msgpack.encode([*step[:5], "0", *step[6:]]),
        "a Step with an unknown mask": msgspec.msgpack.encode([*step[:8], 99, *step[9:]]),
    }
    for name, payload in payloads.items():
        yield f"payload: {name}", [frames(payload)]
    head = b"\x01" + msgspec.msgpack.encode((b"", []))
    envelopes = {
        "no frame to speak of": [b""],
        "another version": [b"\x02" + head[1:]],
        "no envelope": [b"\x01\xc1"],
        "a frame too many": [head, b"1234"],
        "a tensor that is missing": [b"\x01" + msgspec.msgpack.encode((b"", [[8, 1000]]))],
        "an unknown dtype": [b"\x01" + msgspec.msgpack.encode((b"", [[77, 1]])), b"1"],
        "a dimension below zero": [b"\x01" + msgspec.msgpack.encode((b"", [[8, -1]])), b"1234"],
        "a tensor of 2^80 bytes": [b"\x01" + msgspec.msgpack.encode((b"", [[8, 2**40, 2**40]])), b"1234"],
        "empty tensors of 2^80 bytes": [b"\x01" + msgspec.msgpack.encode((b"", [[8, 0, 2**40, 2**40]]))],
        "ten thousand empty frames": [head, *[b""] * 10_000],
        "too few bytes in frame 0": in_frame_0(b"123", [8, 1]),
        "too many bytes in frame 0": in_frame_0(b"12345", [8, 1]),
        "bytes of no tensor in frame 0": in_frame_0(b"1234"),
        "bytes in frame 0, and in another one": [*in_frame_0(b"1234", [8, 1], [8, 1]), b"1234"],
        "bytes in frame 0, and an empty one": [*in_frame_0(b"1234", [8, 1]), b""],
        "a tensor of 2^80 bytes in frame 0": in_frame_0(b"1234", [8, 2**40, 2**40]),
        "a million bytes in frame 0": in_frame_0(bytes(10**6), [1, 10**6]),
        "in memory that is not shared": in_memory((b"x" * 16, 4_096, 1), [8, 1000]),
        "in memory, and in a frame too": [*in_memory((b"x" * 16, 4_096, 1), [8, 1000]), bytes(4_000)],
        "memory of no process": offering((b"x" * 16, 2**40, 3, 1)),
        "memory that is a stream": offering((b"x" * 16, os.getpid(), 0, 1)),
    }
    for name, envelope in envelopes.items():
        yield f"frames: {name}", [envelope]
    yield from hostile_memory()


def in_frame_0(data: bytes, *descriptors: list[int]) -> list[bytes]:
    return [b"\x01" + msgspec.msgpack.encode((b"", descriptors, 0, None, None, data))]


def in_memory(place: object, *descriptors: list[int]) -> list[bytes]:
    return [b"\x01" + msgspec.msgpack.encode((b"", descriptors, 0, place, None))]


def offering(offer: object) -> list[bytes]:
    return [b"\x01" + msgspec.msgpack.encode((b"", [], 0, None, offer))]


def hostile_memory() -> Iterator[Kind]:
    """A ring that is the outsider's own, and in which is not what its messages say."""
    token, file = b"t" * 16, os.memfd_create("hostile")
    try:
        os.ftruncate(file, 4_096 + RING_BYTES)
        os.pwrite(file, token, 0)
        yield "memory: offered again and again", [offering((token, os.getpid(), file, 1))] * 200
        yield "memory: full of holes", [in_memory((token, 4_096, 1), [1, RING_BYTES])] * 3
        yield "memory: beyond its end", [in_memory((token, 4_097, 1), [1, RING_BYTES])]
        yield "memory: where no tensor is", [in_memory((token, 0, 1), [1, 100])]
        os.ftruncate(file, 10_000)
        yield "memory: shortened", [in_memory((token, 4_096, 1), [1, RING_BYTES])] * 3
    finally:
        os.close(file)


class Aim:
    """A session of a model on the shared workers, in the words of messages."""

    def __init__(self, model: Any, past: Any) -> None:
        self.model = model._pipeline._model
        self.version = model._pipeline._routes.current.version
        self.session = past.session._number
        self.number = past.session._next_step

    def step(self, **fields: Any) -> Step:
        step = Step(
            model=self.model,
            plan_version=self.version,
            stage=1,
            session=self.session,
            number=self.number,
            keeps_kv=True,
            layout=None,
            mask=MaskMode.NONE,
            positions=PositionMode.NONE,
            position_rows=0,
            logits_to_keep=1,
            edits=(),
            rope_reach=0,
            sent_us=0,
            timings=(),
        )
        return msgspec.structs.replace(step, **fields)

    def at(self, message: Any) -> Any:
        aims = {"model": self.model, "plan_version": self.version, "session": self.session, "number": self.number}
        return msgspec.structs.replace(
            message, **{name: aims[name] for name in aims.keys() & set(message.__struct_fields__)}
        )


def to_a_worker(aim: Aim) -> Iterator[Kind]:
    """Well-formed messages, of every type and aimed at what is there."""
    for kind in TYPES:
        yield f"{kind.__name__}", [frames(aim.at(example(kind)))]  # type: ignore[arg-type]
    states, ids = torch.zeros(1, 1, 32), torch.tensor([[5]])
    many = KVEdit(kind=KVEditKind.REORDER, values=(0,) * 200_000)
    yield "Step: the next one, forged", [frames(aim.step(), states)]
    yield "Step: to the first stage", [frames(aim.step(stage=0), ids)]
    yield "Step: to the last stage", [frames(aim.step(stage=2), states)]
    yield "Step: the first one again", [frames(aim.step(number=0), states)]
    yield "Step: the last one again", [frames(aim.step(number=aim.number - 1), states)]
    yield "Step: far ahead", [frames(aim.step(number=10**6), states)]
    yield "Step: of a version that is gone", [frames(aim.step(plan_version=0), states)]
    yield "Step: of a version to come", [frames(aim.step(plan_version=aim.version + 1), states)]
    yield (
        "Step: of sessions of its own",
        [frames(aim.step(session=10**6 + each, number=0), states) for each in range(50)],
    )
    yield "Step: many rows", [frames(aim.step(edits=(many,)), states)]
    yield "Step: without tensors", [frames(aim.step())]
    yield "Step: wrong tensors", [frames(aim.step(), torch.zeros(0, 0, 7, dtype=torch.bool))]
    text = PackedText(session=aim.session, number=aim.number, num_new=1, num_logits=1)
    packed = PackedStep(
        model=aim.model,
        plan_version=aim.version,
        stage=1,
        number=1,
        texts=(text,),
        failures=(),
        layout=None,
        sent_us=0,
        timings=(),
    )
    yield "PackedStep: the next one, forged", [frames(packed, states)]
    yield "PackedStep: to the first stage", [frames(msgspec.structs.replace(packed, stage=0), ids)]
    yield "PackedStep: a session twice", [frames(msgspec.structs.replace(packed, texts=(text, text)), states)]
    yield "PackedStep: of nothing", [frames(msgspec.structs.replace(packed, texts=()))]
    crowd = tuple(msgspec.structs.replace(text, session=10**6 + each) for each in range(10_000))
    yield (
        "PackedStep: 10,000 sessions",
        [frames(msgspec.structs.replace(packed, texts=crowd), torch.zeros(1, 10_000, 1))],
    )
    yield from of_groups(aim)
    yield from of_runs(aim)
    rows = tuple(JoinedRows(session=each, number=aim.number, edits=()) for each in (aim.session, 10**9))
    for model in (aim.model, aim.model + 1):
        join: Any = aim.at(example(JoinSessions))  # type: ignore[arg-type]
        join = msgspec.structs.replace(join, model=model, session=10**9 + 1, parts=rows)
        yield f"JoinSessions: of model {model - aim.model:+}", [frames(join)]
    for stage, version in itertools.product((0, 1, 2), (aim.version - 1, aim.version, aim.version + 1)):
        end = EndSession(model=aim.model, plan_version=version, stage=stage, session=aim.session)
        yield f"EndSession: stage {stage}, version {version - aim.version:+}", [frames(end)]
    yield "MoveSession", [frames(MoveSession(model=aim.model, session=aim.session, plan_version=aim.version + 1))]
    for name, rows in {"KVChunk": None, "KVChunk: many rows": (0,) * 100_000}.items():
        place = KVSlice(slot=1, first=0, position=0, capacity=10**6, rows=rows)
        chunk = KVChunk(
            request=1,
            model=aim.model,
            plan_version=aim.version,
            stage=1,
            session=aim.session,
            slices=(place,),
            states=(),
            num_bytes=1,
            max_cache_len=0,
            is_last=True,
            state=SessionState(
                number=1,
                num_tokens=1,
                records_past=False,
                reserved_tokens=0,
                has_mask=False,
                has_positions=False,
                has_source_mask=False,
                lags={},
            ),
        )
        yield name, [frames(chunk, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))]
    fetch = FetchWeight(
        request=1,
        model=aim.model,
        plan_version=aim.version,
        stage=1,
        parameter="model.layers.1.mlp.up_proj.weight",
        first=0,
        receipt=0,
    )
    yield "FetchWeight: 2,000 times", [frames(fetch)] * 2_000
    yield (
        "IntroduceWorker: the caller elsewhere",
        [frames(IntroduceWorker(request=1, name="caller", public_key="x" * 40, address="tcp://127.0.0.1:1"))],
    )
    yield "InspectWorker", [frames(InspectWorker(request=1))]
    yield "Pong: 8,000 times", [frames(Pong(number=each)) for each in range(8_000)]
    yield "Ping: 500 times", [frames(Ping(number=each)) for each in range(500)]
    yield "due in an hour", [[b"\x01" + msgspec.msgpack.encode((encode(Pong(number=1)), [], 2**52))]]
    yield "due at the end of time", [[b"\x01" + msgspec.msgpack.encode((encode(Pong(number=1)), [], 2**64 - 1))]]


def of_groups(aim: Aim) -> Iterator[Kind]:
    """Steps of several sessions, that of this one among them."""
    own, other = aim.step(runner="outsider", run_steps=5), aim.step(session=10**6, number=0)
    pair, states = StepGroup(steps=(own, other)), torch.zeros(2, 1, 32)
    yield "StepGroup: with the next one, forged", [frames(pair, states)]
    yield "StepGroup: the same one many times", [frames(StepGroup(steps=(own,) * 200), torch.zeros(200, 1, 32))] * 20
    yield "StepGroup: too many", [frames(StepGroup(steps=(own,) * 5_000), torch.zeros(5_000, 1))]
    yield "StepGroup: of nothing", [frames(StepGroup(steps=()), torch.zeros(0, 1))]
    yield "StepGroup: without tensors", [frames(pair)]
    yield "StepGroup: wrong tensors", [frames(pair, torch.zeros(2, 0, 7, dtype=torch.bool), states)]
    yield "StepGroup: to several stages", [frames(StepGroup(steps=(aim.step(stage=0), aim.step(stage=2), own)), states)]


def of_runs(aim: Aim) -> Iterator[Kind]:
    """What begins, ends and goes on with runs, of the session and of those that run meanwhile, to any stage."""
    begin: Any = aim.at(example(BeginRun))  # type: ignore[arg-type]
    begin = msgspec.structs.replace(begin, unfinished=(True,), rows=None, samples=False)
    end, ids = EndRun(model=aim.model, session=aim.session, number=aim.number), torch.tensor([[5]])
    sessions = range(aim.session + 1, aim.session + 200)
    yield "BeginRun: of the session", [frames(begin)]
    yield "BeginRun: of steps without end", [frames(msgspec.structs.replace(begin, num_steps=10**18))]
    yield "BeginRun: elsewhere", [frames(msgspec.structs.replace(begin, first_name="outsider"))]
    yield "BeginRun: with a false state", [frames(msgspec.structs.replace(begin, samples=True), torch.zeros(9))]
    yield "EndRun: of the session", [frames(end)]
    yield "EndRun: of all to come", [frames(msgspec.structs.replace(end, session=each, number=0)) for each in sessions]
    step = aim.step(stage=0, runner="outsider", run_steps=5)
    yield "Step: of a run that was never begun", [frames(step, ids)]
    yield (
        "Step: of the runs to come",
        [
            frames(msgspec.structs.replace(step, session=each, number=number), ids)
            for each in sessions
            for number in (0, 1, 5)
        ],
    )


def to_the_caller(aim: Aim) -> Iterator[Kind]:
    """Answers that were not asked for, of every type and to what is waited for."""
    for kind in TYPES:
        yield f"{kind.__name__}", [frames(aim.at(example(kind)))]  # type: ignore[arg-type]
    times = StageTimes(received_bytes=1, hop_us=1, wait_us=1, compute_us=1, codec_us=1)
    done = StepDone(model=aim.model, session=aim.session, number=aim.number, timings=(times,) * 3)
    yield "StepDone: forged logits", [frames(done, torch.full((1, 1, 128), 7.0))]
    forged = PackedDone(
        model=aim.model, number=1, sessions=(aim.session,), failures=(), tokens=(7,), logprobs=(), timings=(times,) * 3
    )
    yield "PackedDone: forged token", [frames(forged)]
    chosen = TokensChosen(
        model=aim.model, session=aim.session, number=aim.number, timings=(times,) * 3, tokens=(7,), goes_on=True
    )
    runs = [
        msgspec.structs.replace(chosen, session=each, number=number, goes_on=goes_on)
        for each in range(aim.session, aim.session + 200)
        for number in (0, 1, 2, 10**9)
        for goes_on in (False, True)
    ]
    yield "TokensChosen: of all sessions to come", [frames(each) for each in runs]
    yield "StepDone: without tensors", [frames(msgspec.structs.replace(done, timings=()))]
    failed = StepFailed(
        model=aim.model,
        session=aim.session,
        number=aim.number,
        kind=FailureKind.ERROR,
        cause="no: \x1b[31m",
        traceback="",
    )
    yield "StepFailed", [frames(failed)]
    refusals = [RequestFailed(request=each, kind=FailureKind.ERROR, cause="no", traceback="") for each in range(500)]
    yield "RequestFailed: of all that may be asked", [frames(each) for each in refusals]
    for address in ("tcp://127.0.0.1:1", "udp://127.0.0.1:1", "pgm://x", "vmci://1:1", "ipc:///run/x.sock"):
        yield (
            f"Hello: from {address.partition(':')[0]}",
            [frames(Hello(pid=1, address=address, environment=read_environment()))],
        )
    logs = [LogRecord(level=each, logger=f"lingualinked.{each}", text="\x1b[2J\n[a] x") for each in range(3_000)]
    yield "LogRecord: 3,000 loggers", [frames(each) for each in logs]


ANSWERED = {"Ping", "Ping: 500 times"}
LOGGED = {"LogRecord", "LogRecord: 3,000 loggers"}


def send(outsider: Outsider, to: str, messages: list[list[bytes]]) -> None:
    for message in messages:
        outsider.send_frames(to, message)


def test_nothing_that_a_bystander_says_costs_anyone_a_token(
    sharded: Any, unsharded: PreTrainedModel, outsider: Outsider
) -> None:
    """Every kind of message to the worker of the middle stage and to the caller, while sessions go on."""
    cluster = sharded.cluster
    engine, pids = cluster._engine, cluster.pids
    expected = unsharded.generate(IDS, max_new_tokens=24, do_sample=False)
    past, past_expected = sharded(IDS).past_key_values, unsharded(IDS).past_key_values
    aim = Aim(sharded, past)

    def num_refused(of: str) -> int:
        if of == "caller":
            return engine._mailbox.num_refused
        report: Any = engine.request(of, InspectWorker(request=engine.next_request()), "a look", 60).result(60)
        assert isinstance(report, WorkerReport)
        return report.worker.num_refused

    enough, counts = threading.Event(), {"caller": {}, "a": {}, "b": {}, "c": {}}

    def keep_generating() -> int:
        num_right = 0
        while not enough.is_set() or not num_right:
            assert torch.equal(sharded.generate(IDS, max_new_tokens=24, do_sample=False), expected)
            num_right += 1
        return num_right

    with ThreadPoolExecutor(1) as pool:
        generating = pool.submit(keep_generating)
        try:
            attacks = [(to, of_runs(aim)) for to in "ac"]  # the first stage, and the last one
            attacks += [("b", itertools.chain(no_messages(), to_a_worker(aim)))]
            attacks += [("caller", itertools.chain(no_messages(), to_the_caller(aim)))]
            for to, kinds in attacks:
                for name, messages in kinds:
                    before = num_refused(to)
                    send(outsider, to, messages)
                    outsider.see_through(to)
                    counts[to][name] = num_refused(to) - before, len(messages)
        finally:
            enough.set()
        assert generating.result(120) > 0
    # Every session is where it was, and every worker lives.
    logits = sharded(IDS[:, :1], past_key_values=past).logits
    assert torch.equal(logits, unsharded(IDS[:, :1], past_key_values=past_expected).logits)
    assert cluster.pids == pids
    del past
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])
    # What is not refused is answered, logged, or about what nobody asked for.
    refused = {to: {name for name, (num, sent) in by.items() if num >= sent} for to, by in counts.items()}
    assert [counts[each].keys() - refused[each] for each in "abc"] == [set(), ANSWERED, set()]
    idle = counts["caller"].keys() - refused["caller"]
    unasked = {kind.__name__ for kind, role in TO_CALLER.items() if kind is not Hello}
    assert idle <= ANSWERED | LOGGED | unasked | {
        "RequestFailed: of all that may be asked",
        "PackedDone: forged token",
        "StepDone: forged logits",
        "StepDone: without tensors",
        "TokensChosen: of all sessions to come",
    }


def test_a_bystander_is_lent_nothing_at_any_time(
    shared_cluster: ll.Cluster, outsider: Outsider, tmp_path: Path
) -> None:
    """Weights travel from worker to worker meanwhile; none of them comes here."""
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    whole = reference(folder)
    names, expected = [name for name, _ in whole.named_parameters()], whole(IDS).logits
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as model:
        shutil.rmtree(folder)
        number, enough = model._pipeline._model, threading.Event()

        def keep_asking() -> int:
            num_asked = 0
            while not enough.is_set():
                for to, version, stage in itertools.product("abcd", (1, 2, 3), (0, 1)):
                    for name in names:
                        fetch = FetchWeight(
                            request=num_asked,
                            model=number,
                            plan_version=version,
                            stage=stage,
                            parameter=name,
                            first=0,
                            receipt=0,
                        )
                        outsider.send(to, encode(fetch))
                        num_asked += 1
                    outsider.see_through(to)
            return num_asked

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(keep_asking)
            for spans in ([("c", 0, 1), ("d", 1, 4)], [("b", 0, 3), ("a", 3, 4)]):
                migration = model.rebalance(ll.Plan.from_spans(spans)).migration
                assert migration is not None
                assert migration.weight_bytes > 0
            enough.set()
            assert asking.result(60) >= len(names)
        assert torch.equal(model(IDS).logits, expected)
    assert [decode(each.payload) for each in outsider.heard] == []


def test_the_kinds_cover_every_type_of_message() -> None:
    assert TO_WORKER.keys() | TO_CALLER.keys() == set(TYPES)

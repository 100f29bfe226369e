"""Every message survives the wire, nothing else does, and a step's header stays small."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given, strategies as st

from lingualinked.errors import ProtocolError
from lingualinked.protocol import messages
from lingualinked.protocol.messages import CallerMessage, PeerMessage, WorkerMessage, decode, encode
from lingualinked.protocol.roles import TO_CALLER, TO_WORKER
from lingualinked.protocol.steps import KVEdit, KVEditKind
from lingualinked.transport.wire.codec import Limits, MalformedError, decode_message
from message_examples import STEP, TYPES, example


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_messages_survive(kind: type[messages.Message]) -> None:
    assert decode(encode(example(kind))) == example(kind)


def test_the_documentation_explains_every_message() -> None:
    page = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert [kind.__name__ for kind in TYPES if f"`{kind.__name__}`" not in page] == []


def test_tags_are_unique() -> None:
    tags = [kind.__struct_config__.tag for kind in TYPES]
    assert len(set(tags)) == len(tags) >= 39


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_a_message(payload: bytes) -> None:
    try:
        message = decode(payload)
    except ProtocolError:
        return
    assert isinstance(message, messages.Message)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x93\x10\x01\xa2\xff\xfe",  # a text that is not UTF-8
        b"\xdc\x27\x10\x05\x01\x01\x01\x01" + b"\x91" * 9_995,  # surplus fields, and very deep ones
        b"\x91" * 100_000,
        b"\x81" * 100_000,
        b"\x94\x08\x01\xa1a\xdd\xff\xff\xff\xff",  # a row of four billion numbers
        b"\xdb\xff\xff\xff\xff",
    ],
    ids=lambda payload: payload[:8].hex(),
)
def test_what_ended_a_worker_once(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(payload)


def damaged(rng: random.Random, payload: bytes) -> bytes:
    """Corrupted bytes of a message: some changed, left out, repeated, or replaced by deep nesting or huge lengths."""
    wrong = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(wrong) + 1)
        match rng.randrange(6):
            case 0:
                wrong[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del wrong[at : at + rng.randint(1, 8)]
            case 2:
                wrong[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                wrong[at:at] = wrong[: rng.randint(1, 40)]
            case 4:
                wrong[at : at + 1] = rng.choice([b"\x91", b"\x81\xa0", b"\x91\x81\xa0"]) * rng.choice([1, 10, 3000])
            case _:
                wrong[at : at + 1] = rng.choice(PROMISES)
    return bytes(wrong)


PROMISES = [bytes([head]) + b"\xff" * 8 for head in range(0xC4, 0xE0)]


@pytest.mark.parametrize("seed", range(10))
def test_whatever_comes_is_refused_or_a_message(seed: int) -> None:
    rng = random.Random(seed)
    good = [encode(example(kind)) for kind in TYPES]  # type: ignore[arg-type]
    for _ in range(1_000):
        payload = rng.randbytes(rng.randrange(60)) if rng.random() < 0.2 else damaged(rng, rng.choice(good))
        with contextlib.suppress(ProtocolError):
            assert isinstance(decode(payload), messages.Message)
        frame = b"\x01" + msgspec.msgpack.encode((payload, [[8, 1]]))
        with contextlib.suppress(MalformedError):
            decode_message([damaged(rng, frame), bytes(4)], Limits())


def test_wrong_types_are_refused() -> None:
    fields = msgspec.msgpack.decode(encode(STEP))
    for index in range(1, len(fields)):
        wrong = [*fields[:index], {"a": 1}, *fields[index + 1 :]]
        with pytest.raises(ProtocolError):
            decode(msgspec.msgpack.encode(wrong))


@pytest.mark.parametrize("kind", get_args(messages.Request), ids=lambda kind: kind.__name__)
def test_a_request_of_a_wrong_type_is_refused_where_it_is_made(kind: type[messages.Request]) -> None:
    messages.check(example(kind))
    for name in kind.__struct_fields__:
        with pytest.raises(ProtocolError):
            messages.check(msgspec.structs.replace(example(kind), **{name: {"a": 1}}))


def test_a_decode_steps_header_is_small() -> None:
    assert len(encode(STEP)) <= 104
    beams = KVEdit(kind=KVEditKind.REORDER, values=tuple(range(8)))
    assert len(encode(msgspec.structs.replace(STEP, edits=(beams,)))) <= 120


def test_whoever_has_a_role_for_a_message_knows_its_type() -> None:
    """What is checked by role needs no check of its type."""
    assert TO_WORKER.keys() == {*get_args(CallerMessage), *get_args(PeerMessage)}
    assert TO_CALLER.keys() <= set(get_args(WorkerMessage))

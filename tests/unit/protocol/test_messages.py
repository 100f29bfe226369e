"""Every message survives the wire, nothing else does, and a step's header stays small."""

from __future__ import annotations

from typing import get_origin

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.spec import ModelSpec
from lingualinked.protocol import messages
from lingualinked.protocol.boot import Imitation
from lingualinked.protocol.messages import KVEdit, KVEditKind, StageTimes, Step, decode, encode
from lingualinked.protocol.moving import KVSlice, SessionState

TYPES = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, messages.Message) and kind.__struct_config__.tag is not None
]
TIMES = StageTimes(received_bytes=2000, hop_us=400, wait_us=60_000, compute_us=30_000_000, codec_us=150)
STEP = Step(
    model=3,
    plan_version=1000,
    stage=1,
    session=1_000_000,
    number=100_000,
    keeps_kv=True,
    layout=(True, False),
    mask=MaskMode.EXTEND,
    positions=PositionMode.FROM_MASK,
    position_rows=8,
    logits_to_keep=1,
    edits=(),
    sent_us=2**32 - 1,
    timings=(TIMES, TIMES, TIMES),
)
SPEC = ModelSpec(
    class_name="LlamaForCausalLM",
    config_json="{}",
    dtype="bfloat16",
    attn_implementation=None,
    load_format="safetensors",
    files=("/a",),
)
VALUES = {
    "spec": SPEC,
    "imitation": Imitation(slowdown=2.0, links=()),
    "stages": (),
    "edits": (),
    "timings": (TIMES,),
    "slices": (KVSlice(slot=1, first=0, position=5, capacity=64, rows=(1, 0)),),
    "state": SessionState(number=3, num_tokens=9, records_past=True, has_mask=False),
    "layout": None,
    "logits_to_keep": 1,
    "temperature_c": 40.5,
    "battery_percent": None,
}
BY_TYPE = {"int": 7, "str": "text", "bool": True, "float": 0.5}


def example(kind: type[messages.Message]) -> messages.Message:
    fields = {}
    for field in msgspec.structs.fields(kind):
        if field.name in VALUES:
            fields[field.name] = VALUES[field.name]
        elif (origin := get_origin(field.type)) in (tuple, dict):
            fields[field.name] = origin()
        elif isinstance(field.type, type) and hasattr(field.type, "__members__"):
            fields[field.name] = next(iter(field.type))
        else:
            fields[field.name] = BY_TYPE[field.type.__name__]
    return kind(**fields)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_messages_survive(kind: type[messages.Message]) -> None:
    assert decode(encode(example(kind))) == example(kind)


def test_tags_are_unique() -> None:
    tags = [kind.__struct_config__.tag for kind in TYPES]
    assert len(set(tags)) == len(tags) == 31


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_a_message(payload: bytes) -> None:
    try:
        message = decode(payload)
    except ProtocolError:
        return
    assert isinstance(message, messages.Message)


def test_wrong_types_are_refused() -> None:
    fields = msgspec.msgpack.decode(encode(STEP))
    for index in range(1, len(fields)):
        wrong = [*fields[:index], {"a": 1}, *fields[index + 1 :]]
        with pytest.raises(ProtocolError):
            decode(msgspec.msgpack.encode(wrong))


def test_a_decode_steps_header_is_small() -> None:
    assert len(encode(STEP)) <= 96
    beams = KVEdit(kind=KVEditKind.REORDER, values=tuple(range(8)))
    assert len(encode(msgspec.structs.replace(STEP, edits=(beams,)))) <= 112

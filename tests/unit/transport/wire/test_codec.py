"""The wire format: encoded messages decode to the originals, and malformed ones are refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, strategies as st

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.transport.memory.shared_ring import RingReader, RingWriter
from lingualinked.transport.wire import codec, tensor_descriptors
from lingualinked.transport.wire.codec import Limits, MalformedError, decode_message, encode_message

LIMITS = Limits(max_frame_bytes=64, max_message_bytes=4_096)
ROOMY = Limits()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any dtype and up to four dimensions that is perhaps not contiguous."""
    dtype = draw(st.sampled_from(tensor_descriptors.DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    num_bytes = dtype.itemsize
    for dim in shape:
        num_bytes *= dim
    data = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    tensor = flat.view(shape)
    if tensor.dim() > 1:
        tensor = tensor.permute(*draw(st.permutations(range(tensor.dim()))))
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, tensor.shape[0])) :: 2]
    if draw(st.booleans()) and tensor.dim():
        tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
    return tensor


def bits(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)  # of ordinary strides
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@given(payload=st.binary(max_size=32), sent=st.lists(tensors(), max_size=4), max_frame_bytes=st.integers(80, 1_000))
def test_what_is_encoded_comes_back(payload: bytes, sent: list[torch.Tensor], max_frame_bytes: int) -> None:
    limits = Limits(max_frame_bytes=max_frame_bytes, max_message_bytes=1 << 20)
    frames = encode_message(payload, sent, limits)
    assert max(map(len, frames)) <= max_frame_bytes
    received_payload, received, *_ = decode_message(frames, limits)
    assert received_payload == payload
    assert [(t.dtype, t.shape) for t in received] == [(t.dtype, t.shape) for t in sent]
    assert list(map(bits, received)) == list(map(bits, sent))
    assert all(tensor.is_contiguous() for tensor in received)


@contextlib.contextmanager
def open_ring() -> Iterator[tuple[RingWriter, RingReader, bytes]]:
    """Both ends of a ring that takes tensors of any size, and its token."""
    writer = RingWriter("b")
    assert writer.write([torch.ones(1)]) is None
    offer = writer.pop_offer()
    assert offer is not None
    reader = RingReader(offer)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codec, "MIN_SHARED_BYTES", 0)
            yield writer, reader, offer.token
    finally:
        reader.close()
        writer.close()


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")


@linux_only
@given(payload=st.binary(max_size=32), sent=st.lists(tensors(), min_size=1, max_size=4))
def test_what_is_encoded_comes_back_through_shared_memory(payload: bytes, sent: list[torch.Tensor]) -> None:
    with open_ring() as (writer, reader, token):
        frames = encode_message(payload, sent, ROOMY, None, writer)
        assert len(frames) == 1
        received = decode_message(frames, ROOMY, {token: reader})
    assert received.payload == payload
    assert [(t.dtype, t.shape) for t in received.tensors] == [(t.dtype, t.shape) for t in sent]
    assert list(map(bits, received.tensors)) == list(map(bits, sent))


def refused_or_whole(frames: list[bytes]) -> None:
    try:
        received = decode_message(frames, LIMITS).tensors
    except MalformedError:
        return
    num_bytes = sum(tensor.nbytes for tensor in received)
    assert num_bytes == sum(map(len, frames[1:])) or (len(frames) == 1 and num_bytes < len(frames[0]))


@given(st.lists(st.binary(max_size=80), max_size=5))
def test_any_bytes_are_refused_or_make_sense(frames: list[bytes]) -> None:
    refused_or_whole(frames)


ODD_NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
RECEIPTS = st.integers(1, 255)
ODD_ITEMS = st.none() | st.booleans() | ODD_NUMBERS | st.floats() | st.text(max_size=3) | st.binary(max_size=3)


@given(
    envelope=st.recursive(ODD_ITEMS, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
    | st.tuples(st.binary(max_size=8), st.lists(st.lists(ODD_NUMBERS, max_size=5), max_size=3))
    | st.tuples(
        st.binary(max_size=8),
        st.lists(st.lists(st.integers(0, 4) | ODD_NUMBERS, max_size=4), max_size=3),
        st.just(0),
        st.none(),
        st.none(),
        st.binary(max_size=40) | ODD_ITEMS,
    ),
    rest=st.lists(st.binary(max_size=64), max_size=3),
)
def test_any_envelope_is_refused_or_makes_sense(envelope: Any, rest: list[bytes]) -> None:
    refused_or_whole([b"\x01" + msgspec.msgpack.encode(envelope), *rest])


@given(st.data())
def test_a_damaged_message_is_refused_or_makes_sense(data: st.DataObject) -> None:
    limits = data.draw(st.sampled_from([LIMITS, ROOMY]))  # the bytes of tensors in frames of their own, or in frame 0
    frames = [bytearray(frame) for frame in encode_message(b"payload", [torch.arange(30), torch.ones(3, 2)], limits)]
    frame = data.draw(st.sampled_from(frames))
    position = data.draw(st.integers(0, len(frame) - 1))
    match data.draw(st.sampled_from(["change", "cut", "drop", "repeat"])):
        case "change":
            frame[position] = data.draw(st.integers(0, 255))
        case "cut":
            del frame[position:]
        case "drop":
            frames = [other for other in frames if other is not frame]
        case _:
            frames.append(frame)
    refused_or_whole([bytes(frame) for frame in frames])


def test_the_wire_format_is_this_one() -> None:
    """A change here is a change of the format: it needs another version."""
    frames = encode_message(b"ab", [torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16), torch.empty(0)], ROOMY)
    described = b"\xc4\x02ab" + b"\x92" + b"\x93\x07\x01\x02" + b"\x92\x08\x00"
    assert frames == [b"\x01\x96" + described + b"\x00\xc0\xc0" + b"\xc4\x04" + b"\x80\x3f\x00\xc0"]
    large = torch.zeros(1, codec.MIN_SHARED_BYTES // 4)
    assert list(map(bytes, encode_message(b"ab", [large], ROOMY))) == [
        b"\x01\x92\xc4\x02ab" + b"\x91" + b"\x93\x08\x01\xcd\x10\x00",
        bytes(large.nbytes),
    ]
    names = (
        "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 float8_e4m3fn float8_e5m2 "
        "uint16 uint32 uint64"
    )
    assert [str(dtype).removeprefix("torch.") for dtype in tensor_descriptors.DTYPES] == names.split()


def test_the_header_of_a_decode_step_is_small() -> None:
    frames = encode_message(bytes(60), [torch.zeros(8, 1, 8_192, dtype=torch.bfloat16)], ROOMY)
    assert len(frames[0]) - 60 <= 24


def test_large_contiguous_tensors_are_not_copied() -> None:
    tensor = torch.zeros(codec.MIN_SHARED_BYTES // 4)
    _, frame = encode_message(b"", [tensor], ROOMY)
    tensor[0] = 1.0
    assert bytes(frame[:4]) == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.nn.Parameter(torch.randn(3)),
        torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj().imag,
        torch.tensor(3.5, dtype=torch.float16),
        torch.arange(2).view(1, 2).T,
        torch.arange(4)[2::2],
    ],
    ids=["parameter", "lazily conjugated", "lazily negated", "0-d", "strange stride 2", "strange stride 1"],
)
def test_odd_tensors_are_sent_by_value(tensor: torch.Tensor) -> None:
    (received,) = decode_message(encode_message(b"", [tensor], ROOMY), ROOMY).tensors
    assert torch.equal(received, tensor.detach().resolve_conj().resolve_neg())
    assert not received.requires_grad


def test_tensors_of_inference_mode_are_sent() -> None:
    with torch.inference_mode():
        tensor = torch.randn(3).to(torch.float64)
        (received,) = decode_message(encode_message(b"", [tensor], ROOMY), ROOMY).tensors
        assert torch.equal(received, tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_an_accelerator_are_sent_from_the_cpu() -> None:
    tensor = torch.arange(6, device="cuda").view(2, 3).T
    (received,) = decode_message(encode_message(b"", [tensor], ROOMY), ROOMY).tensors
    assert torch.equal(received, tensor.cpu())


def test_received_tensors_are_aligned_whatever_the_frames_are() -> None:
    frames = [bytes(frame) for frame in encode_message(b"", [torch.arange(5)], LIMITS)]
    shifted = memoryview(b"x" + frames[1])[1:]
    (received,) = decode_message([frames[0], shifted], ROOMY).tensors
    assert received.data_ptr() % 64 == 0
    assert received.tolist() == [0, 1, 2, 3, 4]
    small = torch.ones(1, dtype=torch.uint8)
    received = decode_message(encode_message(b"", [small, torch.arange(5)], ROOMY), ROOMY).tensors[1]
    assert received.data_ptr() % 64 == 0
    assert received.tolist() == [0, 1, 2, 3, 4]


def test_memory_that_was_made_in_advance_is_used_once() -> None:
    spare, received = tensor_descriptors.SpareTensor(), []
    for number, shape in enumerate([(2, 3), (2, 3), (2, 3), (3, 2), (3, 2)]):
        sent = torch.full(shape, number)
        spare.prepare()
        received += decode_message(encode_message(b"", [sent, sent + 1], ROOMY), ROOMY, None, spare).tensors
        received += decode_message(encode_message(b"", [sent + 2], ROOMY), ROOMY, None, spare).tensors
    numbers = [number + each for number in range(5) for each in range(3)]
    assert [tensor.unique().tolist() for tensor in received] == [[number] for number in numbers]
    assert [tensor.shape for tensor in received] == [torch.Size((2, 3))] * 9 + [torch.Size((3, 2))] * 6
    assert len({tensor.data_ptr() for tensor in received}) == len(received)


def test_memory_is_not_made_in_advance_for_more_bytes_than_should_be_in_frame_0() -> None:
    spare = tensor_descriptors.SpareTensor()
    decode_message([inline(bytes(1 << 19), [1, 1 << 19])], ROOMY, None, spare)
    spare.prepare()
    assert spare._tensor is None


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError()])
def test_a_lack_of_memory_made_in_advance_refuses_no_more_than_a_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare, frames = tensor_descriptors.SpareTensor(), encode_message(b"", [torch.ones(3)], ROOMY)
    decode_message(frames, ROOMY, None, spare)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", fail)
        spare.prepare()
        with pytest.raises(type(error)):
            decode_message(frames, ROOMY, None, spare)
    assert decode_message(frames, ROOMY, None, spare).tensors[0].tolist() == [1, 1, 1]


def test_bools_come_in_as_zero_or_one() -> None:
    ways = [envelope([0, 3]), b"\x02\x00\xff"], [inline(b"\x02\x00\xff", [0, 3])]
    for frames in ways:
        (received,) = decode_message(frames, ROOMY).tensors
        assert received.tolist() == [True, False, True]
        assert bits(received) == b"\x01\x00\x01"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(1, device="meta"), "without data"),
        (torch.eye(2).to_sparse(), "of layout torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.complex128), "dtype torch.complex128 can't be sent: convert it to one of bool"),
        (torch.zeros([1] * 17), "17 dimensions"),
        (torch.empty(2**40, 0), r"shape \(1099511627776, 0\)"),
    ],
    ids=["meta", "sparse", "dtype", "dimensions", "empty"],
)
def test_what_can_not_be_sent_is_refused_by_name(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        encode_message(b"", [tensor], ROOMY)


def test_limits_hold_for_the_sender() -> None:
    with pytest.raises(ProtocolError, match="1,025 tensors"):
        encode_message(b"", [torch.empty(0)] * 1_025, ROOMY)
    with pytest.raises(ProtocolError, match="65,538 frames"):
        encode_message(b"", [torch.empty(65_537 * 16, dtype=torch.uint8)], Limits(max_frame_bytes=16))
    with pytest.raises(ProtocolError, match=r"exceeds max_frame_bytes \(16 B\)"):
        encode_message(bytes(16), [], Limits(max_frame_bytes=16))
    with pytest.raises(ProtocolError, match=r"exceeds max_message_bytes \(16 B\)"):
        encode_message(b"", [torch.zeros(4)], Limits(max_frame_bytes=16, max_message_bytes=16))


@pytest.mark.parametrize("values", [(0, 10), (-1, 10), (11, 10)])
def test_limits_have_to_make_sense(values: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match=f"max_frame_bytes={values[0]}"):
        Limits(max_frame_bytes=values[0], max_message_bytes=values[1])


def envelope(*descriptors: list[int]) -> bytes:
    return b"\x01" + msgspec.msgpack.encode([b"", descriptors])


def inline(data: bytes, *descriptors: list[int]) -> bytes:
    return b"\x01" + msgspec.msgpack.encode([b"", descriptors, 0, None, None, data])


@linux_only
@given(
    descriptors=st.lists(st.lists(st.integers(0, 15) | ODD_NUMBERS, min_size=1, max_size=4), max_size=3),
    offset=st.integers(0, 10_000) | ODD_NUMBERS,
    receipt=RECEIPTS | ODD_NUMBERS,
    offer=st.none() | st.tuples(st.binary(min_size=16, max_size=16), ODD_NUMBERS, ODD_NUMBERS, RECEIPTS) | ODD_ITEMS,
    is_known=st.booleans(),
)
def test_any_place_is_refused_or_within_the_ring(
    descriptors: list[list[int]],
    offset: int,
    receipt: int,
    offer: Any,
    is_known: bool,
) -> None:
    with open_ring() as (_, reader, token):
        place = (token if is_known else b"?" * 16, offset, receipt)
        frame = b"\x01" + msgspec.msgpack.encode((b"", descriptors, 0, place, offer))
        try:
            received = decode_message([frame], LIMITS, {token: reader})
        except MalformedError:
            return
    assert is_known
    assert offset >= 4_096
    assert sum(tensor.nbytes for tensor in received.tensors) <= LIMITS.max_message_bytes


@pytest.mark.parametrize(
    ("kind", "frames"),
    [
        ("frames", []),
        ("frames", [b""] * ((1 << 16) + 1)),
        ("version", [b""]),
        ("version", [b"\x00" + envelope()[1:]]),
        ("envelope", [b"\x01"]),
        ("envelope", [envelope() + b"\x00"]),
        ("envelope", [envelope([])]),
        ("envelope", [envelope([1, -1])]),
        ("envelope", [envelope([1] * 18)]),
        ("envelope", [b"\x01" + msgspec.msgpack.encode([b"", [[1]] * 1_025])]),
        ("envelope", [b"\x01" + msgspec.msgpack.encode(["text", []])]),
        ("dtype", [envelope([16]), b"a"]),
        ("size", [envelope([1, 2**63, 2])]),
        ("size", [envelope([1, 0, 2**40])]),
        ("size", [envelope([1, 3_000]), *[bytes(1_000)] * 5]),
        ("size", [envelope(), bytes(1_001)]),
        ("tensor bytes", [envelope([5, 2]), bytes(15)]),
        ("tensor bytes", [envelope([1, 2], [1, 2]), b"abc", b"d"]),
        ("tensor bytes", [envelope([1, 0]), b""]),
        ("tensor bytes", [envelope([1, 2]), b"", b"ab"]),
        ("tensor bytes", [inline(b"abc", [1, 2])]),
        ("tensor bytes", [inline(b"a", [1, 2])]),
        ("tensor bytes", [inline(b"a")]),
        ("tensor bytes", [inline(b"a", [1, 2]), b"b"]),
        ("tensor bytes", [inline(b"ab", [1, 2]), b"ab"]),
        ("tensor bytes", [inline(b"ab", [1, 2]), b""]),
        ("tensor bytes", [inline(b"ab", [1, 2], [1, 2]), b"cd"]),
        ("envelope", [inline("text", [1, 4])]),
    ],
)
def test_malformed_messages_are_refused_by_kind(kind: str, frames: list[bytes]) -> None:
    limits = Limits(max_frame_bytes=1_000, max_message_bytes=4_000)
    if kind == "envelope":
        limits = ROOMY
    with pytest.raises(MalformedError) as caught:
        decode_message(frames, limits)
    assert caught.value.kind == kind

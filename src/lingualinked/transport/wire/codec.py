"""The wire format of a message: frame 0 holds the payload, describes the tensors, and holds their bytes if they are few.

Otherwise these are in the frames after it, or in shared memory. Knows no sockets, and not what a payload means.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

import msgspec
import torch
from torch import Tensor

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.quantities import bytes_text, count_text
from lingualinked.transport.memory.shared_ring import Place, RingOffer, RingReader, RingWriter
from lingualinked.transport.wire.message_limits import (
    DEFAULT_MAX_FRAME_BYTES,
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_NUM_FRAMES,
    MAX_NUM_TENSORS,
    MIN_SHARED_BYTES,
)
from lingualinked.transport.wire.tensor_bytes import bytes_of, copy_bytes, memory_of
from lingualinked.transport.wire.tensor_descriptors import (
    DTYPES,
    ITEM_SIZES,
    Descriptor,
    Natural,
    SpareTensor,
    allocate_tensor,
    describe_tensor,
    num_bytes_at_least,
)

if TYPE_CHECKING:
    from lingualinked.transport.hosts.shaping import ShapedLink

WIRE_VERSION = 1
"""First byte of every message. The rest of frame 0 is the msgpack array ``[payload, [[dtype code, *shape], ...]]``; on an
emulated link a third element gives the time at which the message is due, in microseconds of the machine's monotonic clock.
A fourth one says where the tensors are in shared memory, if no frames follow; a fifth one offers such memory. A sixth one
holds the bytes of all tensors, one after the other, if they are fewer than `MIN_SHARED_BYTES`: a frame of their own would take
both sides longer than these bytes."""

Frame: TypeAlias = bytes | memoryview


class _Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    payload: bytes
    descriptors: Annotated[list[Descriptor], msgspec.Meta(max_length=MAX_NUM_TENSORS)]
    due_us: Natural = 0
    place: Place | None = None
    offer: RingOffer | None = None
    data: bytes = b""


_RING_HEAD_BYTES = 96  # at most; of a place, an offer and a due time in frame 0

_VERSION_BYTE = bytes([WIRE_VERSION])
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Envelope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits on the size of a message; a sender and its receivers must have the same ones."""

    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES  # larger tensors are split; a payload must fit into one frame
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES  # of all frames

    def __post_init__(self) -> None:
        if not 0 < self.max_frame_bytes <= self.max_message_bytes:
            raise ArgumentError(
                f"max_frame_bytes={self.max_frame_bytes} must be positive "
                f"and no larger than max_message_bytes={self.max_message_bytes}"
            )


class MalformedError(ProtocolError):
    """Received frames are not a valid message; mailboxes count and log this, and nobody outside this room sees it.

    `kind` is one of a fixed set of words, `detail` says what is wrong, with the values.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class DecodedMessage(NamedTuple):
    """A message as its receiver decodes it; the tensors are aligned, contiguous copies on the CPU.

    `due_us` is when it would have arrived on the link that the sender emulates (monotonic microseconds); 0: it is due now.
    `offer` is of a ring that the sender would like to use for later messages. `shared_bytes` of the tensors came in such a ring.
    """

    payload: bytes
    tensors: tuple[Tensor, ...]
    due_us: int = 0
    offer: RingOffer | None = None
    shared_bytes: int = 0


def encode_message(
    payload: bytes,
    tensors: Sequence[Tensor],
    limits: Limits,
    link: ShapedLink | None = None,
    ring: RingWriter | None = None,
) -> list[Frame]:
    """Encode a payload and dense tensors as the frames of one message, or raise ProtocolError if they can't be sent.

    The frames may share memory with the tensors: copy the frames before anything changes the tensors. If the ring to
    the receiver has taken the tensors, there is one frame only.
    """
    # 1) describe the tensors in frame 0, which holds those that are small, and refuse what exceeds the limits
    descriptors = [describe_tensor(tensor) for tensor in tensors]
    sizes = [ITEM_SIZES[descriptor[0]] * math.prod(descriptor[1:]) for descriptor in descriptors]
    num_tensor_bytes = sum(sizes)
    data = b"".join(map(copy_bytes, tensors, sizes)) if num_tensor_bytes < MIN_SHARED_BYTES else b""
    head = _encode_head(payload, descriptors, data=data)
    if data and len(head) + _RING_HEAD_BYTES > limits.max_frame_bytes:
        data, head = b"", _encode_head(payload, descriptors)
    num_bytes = _check_limits(len(head) - len(data), descriptors, sizes, limits)
    # 2) put the bytes of large tensors into shared memory, or offer it
    place = offer = None
    is_large = num_tensor_bytes >= MIN_SHARED_BYTES and len(head) + _RING_HEAD_BYTES <= limits.max_frame_bytes
    if ring is not None and is_large:
        place = ring.write(tensors)
        offer = None if place is not None else ring.pop_offer()
    elif ring is not None:
        ring.return_memory()
    # 3) on an emulated link, add the time at which the message is due
    due_us = 0 if link is None else link.schedule_message(num_bytes)
    if due_us or place is not None or offer is not None:
        head = _encode_head(payload, descriptors, due_us, place, offer, data)
    # 4) add the bytes of the tensors, in frames of limited size
    frames: list[Frame] = [head]
    for tensor in () if data or place is not None else tensors:
        if tensor.numel():
            memory, size = bytes_of(tensor), limits.max_frame_bytes
            frames.extend(memory[start : start + size] for start in range(0, len(memory), size))
    return frames


def decode_message(
    frames: Sequence[Frame],
    limits: Limits,
    rings: Mapping[bytes, RingReader] | None = None,
    spare: SpareTensor | None = None,
) -> DecodedMessage:
    """Decode the frames of one message, or raise MalformedError if they are not a valid one, or exceed the limits.

    The frames are not trusted: memory is allocated only after the descriptors have been found to match the bytes
    received. Memoryviews must be of unsigned bytes. The sender may have split tensors at another `max_frame_bytes`.
    `rings` are those that this sender's tensors may be in, by token. A small tensor may get the memory that `spare` has.
    """
    # 1) check sizes and version before anything is decoded
    num_tensor_bytes = _check_sizes(frames, limits)
    head = frames[0]
    if not head or head[0] != WIRE_VERSION:
        found = head[0] if head else "none"
        raise MalformedError("version", f"wire version {found}, this side speaks {WIRE_VERSION}")
    # 2) decode frame 0, and check that its descriptors match the bytes received
    try:
        envelope = _decoder.decode(memoryview(head)[1:])
    except Exception as error:  # noqa: BLE001 - msgspec also raises errors that are not its own
        raise MalformedError("envelope", str(error)) from None
    descriptors, data = envelope.descriptors, envelope.data
    sizes = [_num_bytes_described(descriptor, limits) for descriptor in descriptors]
    expected_bytes = sum(sizes) if envelope.place is None else 0
    if expected_bytes != num_tensor_bytes + len(data) or (data and num_tensor_bytes):
        raise MalformedError(
            "tensor bytes",
            f"the descriptors announce {count_text(expected_bytes, 'byte')} of tensors, and {len(data):,} arrived in frame 0, and "
            f"{num_tensor_bytes:,} in others",
        )
    # 3) copy shared memory, frame 0, or else the frames after it, into new tensors
    rest = iter(frames[1:])
    if envelope.place is not None:
        tensors = _read_place(envelope.place, rings or {}, descriptors, sizes, limits.max_message_bytes - len(head))
    elif data:
        tensors = _split_bytes(data, descriptors, sizes, spare or SpareTensor())
    else:
        tensors = tuple(_join(rest, descriptor, size) for descriptor, size in zip(descriptors, sizes, strict=True))
    if next(rest, None) is not None:
        raise MalformedError("tensor bytes", "an empty frame follows the last tensor")
    num_shared_bytes = sum(sizes) if envelope.place is not None else 0
    return DecodedMessage(envelope.payload, tensors, envelope.due_us, envelope.offer, num_shared_bytes)


def _encode_head(
    payload: bytes,
    descriptors: list[list[int]],
    due_us: int = 0,
    place: Place | None = None,
    offer: RingOffer | None = None,
    data: bytes = b"",
) -> bytes:
    """Encode frame 0, without the elements behind the last one that says something."""
    if data:
        return _VERSION_BYTE + _encoder.encode((payload, descriptors, due_us, place, offer, data))
    if place is not None or offer is not None:
        return _VERSION_BYTE + _encoder.encode((payload, descriptors, due_us, place, offer))
    return _VERSION_BYTE + _encoder.encode((payload, descriptors, due_us) if due_us else (payload, descriptors))


def _check_limits(num_head_bytes: int, descriptors: list[list[int]], sizes: list[int], limits: Limits) -> int:
    """Refuse to send what a receiver would drop; otherwise return the bytes of all frames."""
    if len(sizes) > MAX_NUM_TENSORS:
        raise ProtocolError(
            f"a message of {count_text(len(sizes), 'tensor')} exceeds the limit of {MAX_NUM_TENSORS}: send several"
        )
    if num_head_bytes > limits.max_frame_bytes:
        raise ProtocolError(
            f"payload and tensor shapes take {bytes_text(num_head_bytes, round_up=True)}, which exceeds max_frame_bytes "
            f"({bytes_text(limits.max_frame_bytes)}): send less at once, data as a tensor, or raise the limit on all sides"
        )
    num_bytes, num_frames = num_head_bytes, 1
    for (code, *shape), size in zip(descriptors, sizes, strict=True):
        num_bytes += size
        num_frames += -(-size // limits.max_frame_bytes)
        if not size and num_bytes_at_least(shape, ITEM_SIZES[code]) > limits.max_message_bytes:
            raise ProtocolError(f"an empty tensor of shape {tuple(shape)} can't be sent: its dimensions are too large")
    if num_bytes > limits.max_message_bytes:
        raise ProtocolError(
            f"a message of {bytes_text(num_bytes, round_up=True)} exceeds max_message_bytes "
            f"({bytes_text(limits.max_message_bytes)}): send it in several messages, or raise the limit on all sides"
        )
    if num_frames > MAX_NUM_FRAMES:
        raise ProtocolError(
            f"a message of {count_text(num_frames, 'frame')} of at most {bytes_text(limits.max_frame_bytes)} exceeds the limit "
            f"of {MAX_NUM_FRAMES}: send it in several messages, or raise max_frame_bytes on all sides"
        )
    return num_bytes


def _check_sizes(frames: Sequence[Frame], limits: Limits) -> int:
    """Return the total bytes of the frames after frame 0."""
    if len(frames) == 1 and len(frames[0]) <= limits.max_frame_bytes:  # most are
        return 0
    sizes = [len(frame) for frame in frames]
    if not 1 <= len(sizes) <= MAX_NUM_FRAMES:
        raise MalformedError(
            "frames", f"a message of {count_text(len(sizes), 'frame')}, and 1 to {MAX_NUM_FRAMES} are allowed"
        )
    total = sum(sizes)
    if max(sizes) > limits.max_frame_bytes or total > limits.max_message_bytes:
        raise MalformedError(
            "size",
            f"a message of {count_text(total, 'byte')} with a frame of {max(sizes)}, "
            f"and the limits are {limits.max_message_bytes} and {limits.max_frame_bytes}",
        )
    return total - sizes[0]


def _num_bytes_described(descriptor: list[int], limits: Limits) -> int:
    """Return the bytes of the tensor that a descriptor announces."""
    code, *shape = descriptor
    if code >= len(DTYPES):
        raise MalformedError("dtype", f"code {code} is not a valid dtype code (0 to {len(DTYPES) - 1})")
    num_bytes = num_bytes_at_least(shape, ITEM_SIZES[code])
    if num_bytes > limits.max_message_bytes:
        raise MalformedError(
            "size", f"a tensor of shape {shape} exceeds max_message_bytes ({bytes_text(limits.max_message_bytes)})"
        )
    return 0 if 0 in shape else num_bytes


def _read_place(
    place: Place, rings: Mapping[bytes, RingReader], descriptors: list[Descriptor], sizes: list[int], max_bytes: int
) -> tuple[Tensor, ...]:
    """Copy the tensors at a place in shared memory into memory of their own."""
    ring = rings.get(place.token)
    if ring is None:
        raise MalformedError("shared memory", "the tensors are in memory that this side has not opened")
    try:
        if sum(sizes) > max_bytes:
            raise MalformedError("size", f"{count_text(sum(sizes), 'byte')} of tensors, and the limit is {max_bytes}")
        ring.check_place(place, sizes)
        tensors = [allocate_tensor(descriptor, is_pinned=ring.is_pinned) for descriptor in descriptors]
        ring.read(place, tensors)
    except MalformedError:
        raise
    except ProtocolError as error:
        raise MalformedError("shared memory", str(error)) from None
    finally:
        ring.release(place.receipt)
    return tuple(map(_with_valid_bools, tensors))


def _split_bytes(data: bytes, descriptors: list[list[int]], sizes: list[int], spare: SpareTensor) -> tuple[Tensor, ...]:
    """Copy bytes, of which there are as many as the sizes say, into the memory of tensors."""
    tensors, end = [], 0
    for descriptor, size in zip(descriptors, sizes, strict=True):
        tensor, start, end = spare.pop(descriptor, size), end, end + size
        if size:
            ctypes.memmove(tensor.data_ptr(), data if size == len(data) else data[start:end], size)
        tensors.append(_with_valid_bools(tensor))
    return tuple(tensors)


def _join(frames: Iterator[Frame], descriptor: list[int], num_bytes: int) -> Tensor:
    """Copy the frames of one tensor into its memory."""
    tensor = allocate_tensor(descriptor)
    if not num_bytes:
        return tensor
    memory = memory_of(tensor)
    end = 0
    while end < num_bytes:
        frame = next(frames)  # never missing: the sum of all sizes has been checked
        start, end = end, end + len(frame)
        if start == end or end > num_bytes:
            left = num_bytes - start
            raise MalformedError(
                "tensor bytes", f"a frame of {count_text(len(frame), 'byte')}, where {left:,} of a tensor are missing"
            )
        memory[start:end] = frame
    return _with_valid_bools(tensor)


def _with_valid_bools(tensor: Tensor) -> Tensor:
    """Return a tensor in whose place no bool is neither 0 nor 1: that would be undefined behaviour later on."""
    return tensor.view(torch.uint8).ne(0) if tensor.dtype is torch.bool else tensor

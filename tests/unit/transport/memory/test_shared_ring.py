"""A ring in shared memory: what is read is what was written, and neither end can harm the other."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from lingualinked.errors import ProtocolError
from lingualinked.transport.memory import shared_ring
from lingualinked.transport.memory.rings import Rings
from lingualinked.transport.memory.shared_ring import Place, RingOffer, RingReader, RingWriter
from lingualinked.transport.wire.codec import Limits, encode_message
from lingualinked.transport.wire.message_limits import KEPT_RING_BYTES, RING_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")

CAPACITY = 4_096
BEGIN, END = 4_096, 4_096 + CAPACITY  # offsets of tensors in the file
RECEIPT_OFFSET = 64


class Ends:
    """Both ends of one ring."""

    def __init__(self, capacity: int = CAPACITY, kept_bytes: int = KEPT_RING_BYTES) -> None:
        self.writer = RingWriter("b", capacity, kept_bytes)
        assert self.writer.write([numbered(64)]) is None  # opens it
        offer = self.writer.pop_offer()
        assert offer is not None
        assert self.writer.pop_offer() is None  # offered once
        self.offer = offer
        self.reader = RingReader(offer)

    def read(self, place: Place, like: list[torch.Tensor]) -> list[torch.Tensor]:
        """Read as a receiver does."""
        self.reader.check_place(place, [tensor.nbytes for tensor in like])
        tensors = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in like]
        self.reader.read(place, tensors)
        self.reader.release(place.receipt)
        return tensors

    def confirm(self, receipt: int) -> None:
        """Write a receipt as a hostile receiver may."""
        os.pwrite(self.offer.descriptor, bytes([receipt]), RECEIPT_OFFSET)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Check descriptors here too: the check that every test is under leaves shared memory out."""
    before = descriptors()
    yield
    assert descriptors() == before


def descriptors() -> set[int]:
    return {each for each in range(256) if Path(f"/proc/self/fd/{each}").is_symlink()}


def numbered(num_bytes: int, first: int = 0) -> torch.Tensor:
    return (torch.arange(num_bytes) + first).to(torch.uint8)


def written(ends: Ends, num_bytes: int, first: int = 0) -> Place:
    place = ends.writer.write([numbered(num_bytes, first)])
    assert place is not None
    return place


@given(
    st.lists(
        st.lists(st.integers(0, 2_500), min_size=1, max_size=3).map(tuple) | st.just(None),
        max_size=40,
    )
)
def test_whatever_is_read_is_what_was_written(steps: list[tuple[int, ...] | None]) -> None:
    """A tuple: one message of tensors of so many bytes. None: the oldest message is read."""
    ends, unread = Ends(), deque[tuple[Place, list[torch.Tensor]]]()
    try:
        for number, step in enumerate(steps):
            if step is not None:
                sent = [numbered(size, 7 * number) for size in step]
                place = ends.writer.write(sent)
                num_bytes = sum(-(-size // 64) * 64 for size in step)
                assert place is not None or unread or num_bytes > CAPACITY
                if place is not None:
                    assert BEGIN <= place.offset <= place.offset + num_bytes <= END
                    unread.append((place, sent))
            elif unread:
                place, sent = unread.popleft()
                assert all(map(torch.equal, ends.read(place, sent), sent))
        for place, sent in unread:
            assert all(map(torch.equal, ends.read(place, sent), sent))
    finally:
        ends.close()


def test_messages_wrap_around_and_wait_for_room(ends: Ends) -> None:
    first, second = written(ends, 2_000), written(ends, 1_000, 1)
    assert ends.writer.write([numbered(1_500)]) is None  # full
    ends.read(first, [numbered(2_000)])
    third = written(ends, 1_500, 2)
    assert (first.offset, second.offset, third.offset) == (BEGIN, BEGIN + 2_048, BEGIN)
    assert ends.writer.write([numbered(600)]) is None  # 544 bytes are left between the third and the second
    fourth = written(ends, 500, 3)
    for place, size, number in ((second, 1_000, 1), (third, 1_500, 2), (fourth, 500, 3)):
        assert torch.equal(ends.read(place, [numbered(size)])[0], numbered(size, number))


def test_a_ring_that_has_been_read_begins_in_front_and_takes_no_more_memory() -> None:
    ends = Ends(RING_BYTES)
    try:
        for _ in range(300):
            assert ends.read(written(ends, 10_000), [numbered(10_000)])
        assert written(ends, 10_000).offset == BEGIN
        assert os.fstat(ends.offer.descriptor).st_blocks * 512 < 64 << 10
    finally:
        ends.close()


def test_memory_for_an_unusual_message_is_returned_with_the_next_ordinary_one() -> None:
    ends = Ends(RING_BYTES)
    large = torch.zeros(KEPT_RING_BYTES + (1 << 20), dtype=torch.uint8)
    try:

        def num_bytes() -> int:
            return os.fstat(ends.offer.descriptor).st_blocks * 512

        for _ in range(2):
            place = ends.writer.write([large])
            assert place is not None
            ends.reader.release(place.receipt)
            assert num_bytes() >= large.nbytes  # kept, for there may be another
        ends.read(written(ends, 1_000), [numbered(1_000)])
        assert num_bytes() == KEPT_RING_BYTES + BEGIN
        place = ends.writer.write([large + 1])
        assert place is not None
        assert torch.equal(ends.read(place, [large])[0], large + 1)
    finally:
        ends.close()


def test_no_more_messages_are_unread_than_there_are_receipts(ends: Ends) -> None:
    big = Ends(1 << 20)
    try:
        places = [written(big, 64) for _ in range(254)]
        assert big.writer.write([numbered(64)]) is None
        assert len({place.receipt for place in places}) == 254
        big.reader.release(places[100].receipt)  # covers what was sent before, read or not
        assert [written(big, 64).offset for _ in range(101)]
        assert big.writer.write([numbered(64)]) is None
    finally:
        big.close()


def test_memory_is_returned_when_only_small_messages_follow() -> None:
    """As decode steps do after a long prompt."""
    ends, limits = Ends(1 << 20, CAPACITY), Limits()
    try:
        ends.writer.return_memory()
        place = written(ends, 1 << 20)
        encode_message(b"", [numbered(64)], limits, ring=ends.writer)
        assert torch.equal(
            ends.read(place, [numbered(1 << 20)])[0], numbered(1 << 20)
        )  # nothing that is unread is lost
        encode_message(b"", [numbered(64)], limits, ring=ends.writer)
        assert os.fstat(ends.offer.descriptor).st_blocks * 512 == BEGIN + CAPACITY
        ends.read(written(ends, 1 << 20), [numbered(1 << 20)])
        ends.writer.close()
        encode_message(b"", [numbered(64)], limits, ring=ends.writer)
    finally:
        ends.close()


@pytest.mark.parametrize("call", ["_Unread", "Place"])
def test_an_interrupted_message_leaves_no_gap_in_the_receipts(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """With one, the last message could have the receipt of what is confirmed already, and would never be."""
    ends = Ends(1 << 20)
    try:
        ends.reader.release(written(ends, 64).receipt)
        places = [written(ends, 64) for _ in range(100)]
        with monkeypatch.context() as patch:
            patch.setattr(shared_ring, call, interrupting)
            with pytest.raises(KeyboardInterrupt):
                ends.writer.write([numbered(64)])
        while (place := ends.writer.write([numbered(64)])) is not None:
            places.append(place)
        assert len({place.receipt for place in places}) == len(places) >= 253
        ends.reader.release(places[-1].receipt)
        assert written(ends, 64).offset == BEGIN
    finally:
        ends.close()


def interrupting(*_: object) -> Any:
    raise KeyboardInterrupt


def test_memory_is_allocated_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal makes some kernels begin a call again: with one every 10 ms, a large one would never end."""
    large, sizes = Ends(RING_BYTES), []
    allocate = os.posix_fallocate

    def note(file: int, offset: int, num_bytes: int) -> None:
        sizes.append(num_bytes)
        allocate(file, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", note)
    try:
        assert large.writer.write([torch.zeros(10_000_000, dtype=torch.uint8)]) is not None
        assert sum(sizes) >= 10_000_000
        assert max(sizes) <= 4 << 20
    finally:
        large.close()


def test_what_is_larger_than_the_ring_is_not_taken(ends: Ends) -> None:
    assert ends.writer.write([numbered(CAPACITY + 1)]) is None
    assert written(ends, CAPACITY).offset == BEGIN


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12, dtype=torch.bfloat16).view(3, 4).T,
        torch.arange(12.0).view(3, 4)[:, ::2],
        torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj().imag,
        torch.nn.Parameter(torch.randn(3)),
        torch.nn.Parameter(torch.randn(3, 2)).T,
        torch.tensor(True),
        torch.ones(2, 3, dtype=torch.float8_e4m3fn).T,
        torch.empty(0, 5),
    ],
    ids=["transposed", "strided", "conjugated", "negated", "parameter", "view of one", "0-d", "float8", "empty"],
)
def test_tensors_of_any_layout_are_written_by_value(ends: Ends, tensor: torch.Tensor) -> None:
    place = ends.writer.write([numbered(3), tensor])
    assert place is not None
    _, received = ends.read(place, [numbered(3), tensor])
    assert received.dtype == tensor.dtype
    assert torch.equal(received, tensor.detach().resolve_conj().resolve_neg())


def test_nothing_is_written_before_the_receiver_has_opened_it() -> None:
    writer = RingWriter("b", CAPACITY)
    for _ in range(3):
        assert writer.write([numbered(64)]) is None
    offer = writer.pop_offer()
    assert offer is not None
    reader = RingReader(offer)
    assert writer.write([numbered(64)]) is not None
    reader.close()
    writer.close()
    writer.close()
    assert writer.write([numbered(64)]) is None
    assert writer.pop_offer() is None


@pytest.mark.parametrize("receipt", [4, 200, 255])
def test_a_receipt_for_nothing_ends_the_ring(ends: Ends, receipt: int, caplog: pytest.LogCaptureFixture) -> None:
    written(ends, 64)  # with receipt 2
    written(ends, 64)
    ends.confirm(receipt)
    for _ in range(3):
        assert ends.writer.write([numbered(64)]) is None
    assert "'b' confirmed what it was not sent" in caplog.text


def test_a_ring_whose_receiver_has_closed_it_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    ends = Ends()
    written(ends, 64)
    ends.reader.close()
    assert ends.writer.write([numbered(64)]) is None
    assert ends.writer._file is None  # its memory is returned
    assert caplog.text == ""


def test_a_receipt_that_runs_ahead_harms_only_who_writes_it(ends: Ends) -> None:
    place = written(ends, 1_000)
    ends.confirm(place.receipt)
    assert written(ends, 1_000, 1).offset == place.offset


def test_a_receiver_can_neither_shorten_the_ring_nor_end_its_sender_by_holes(ends: Ends) -> None:
    for size in (0, END - 1, END + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(ends.reader._file, size)
    with mmap.mmap(ends.reader._file, END) as opened:
        opened.madvise(mmap.MADV_REMOVE, BEGIN, CAPACITY)
    assert torch.equal(ends.read(written(ends, CAPACITY), [numbered(CAPACITY)])[0], numbered(CAPACITY))


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate", "posix_fallocate"])
def test_without_memory_to_share_there_is_no_ring(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(os, call, refusing)
    writer = RingWriter("b", CAPACITY)
    for _ in range(2):
        assert writer.write([numbered(64)]) is None
        assert writer.pop_offer() is None
    writer.close()


def test_where_memory_runs_out_messages_carry_their_tensors(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends.read(written(ends, 1_000), [numbered(1_000)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refusing)
        assert ends.writer.write([numbered(2_000)]) is None
        assert ends.read(written(ends, 1_000), [numbered(1_000)])  # it has this memory already
    assert ends.read(written(ends, 2_000), [numbered(2_000)])


def refusing(*_: object) -> Any:
    raise OSError(errno.ENOSPC, "no space left")


def test_elsewhere_there_is_no_ring(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    rings = Rings(is_used=True)
    rings.add_writer("b")
    rings.open_reader("key", ends.offer)
    assert (rings.writers, rings.readers) == ({}, {})


@pytest.mark.parametrize(
    ("offset", "sizes"),
    [
        (0, [64]),
        (BEGIN - 1, [64]),
        (END - 63, [64]),
        (END, [1]),
        (BEGIN, [CAPACITY + 1]),
        (BEGIN, [64] * 65),
        (2**63, [64]),
        (BEGIN, [2**63]),
    ],
)
def test_a_place_outside_the_ring_is_refused(ends: Ends, offset: int, sizes: list[int]) -> None:
    with pytest.raises(ProtocolError, match="where a ring holds tensors"):
        ends.reader.check_place(Place(ends.offer.token, offset, 1), sizes)


SHRINK, GROW, WRITE = 2, 4, 8  # seals; not everywhere does Python know their names


def make_file(token: bytes = b"t" * 16, num_bytes: int = END, seals: int = SHRINK | GROW) -> int:
    file = os.memfd_create("mine", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, num_bytes)
    if num_bytes:
        os.pwrite(file, token, 0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def test_a_file_with_holes_ends_nobody() -> None:
    file = make_file()
    reader = RingReader(RingOffer(b"t" * 16, os.getpid(), file, 1))
    place, tensor = Place(b"t" * 16, BEGIN, 2), numbered(100)
    reader.check_place(place, [100])
    reader.read(place, [tensor])
    assert not tensor.any()
    with pytest.raises(PermissionError):
        os.ftruncate(file, BEGIN)
    with mmap.mmap(file, END) as opened:
        opened.madvise(mmap.MADV_REMOVE, 0, END)
    reader.read(place, [tensor])
    reader.release(2)
    reader.close()
    os.close(file)


def test_reading_ends_where_there_is_nothing_more(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sealed file does not become shorter; if a kernel thought otherwise, the receiver would not go on for ever."""
    place = written(ends, 100)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ProtocolError, match="shortened"):
        ends.read(place, [numbered(100)])


def regular_file(folder: Path) -> int:
    (folder / "file").write_bytes((b"t" * 16).ljust(END))
    return os.open(folder / "file", os.O_RDWR)


def memory_file(**options: Any) -> Callable[[Path], int]:
    return lambda _: make_file(**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: os.pipe2(os.O_CLOEXEC)[0],
        lambda _: os.open("/dev/zero", os.O_RDWR),
        lambda folder: os.open(folder, os.O_RDONLY),
        lambda _: socket.socket().detach(),
        lambda _: os.eventfd(0),
        regular_file,
        memory_file(token=b"u" * 16),
        memory_file(token=b""),
        memory_file(num_bytes=0),
        memory_file(seals=0),
        memory_file(seals=SHRINK),
        memory_file(seals=GROW),
        memory_file(num_bytes=BEGIN),
        memory_file(num_bytes=BEGIN + RING_BYTES + 1),
        memory_file(seals=SHRINK | GROW | WRITE),
    ],
    ids=[
        "pipe", "device", "folder", "socket", "event", "file", "token", "no token", "empty",
        "any size", "growing", "shrinking", "small", "large", "read-only",
    ],
)  # fmt: skip
def test_what_is_no_ring_is_not_opened(tmp_path: Path, make: Callable[[Path], int]) -> None:
    before = descriptors()
    file = make(tmp_path)
    opened = descriptors() - before
    try:
        with pytest.raises((ProtocolError, OSError)):
            RingReader(RingOffer(b"t" * 16, os.getpid(), file, 1))
        assert descriptors() - before == opened
        if make is regular_file:
            assert (tmp_path / "file").read_bytes() == (b"t" * 16).ljust(END)
    finally:
        for each in opened:
            os.close(each)


def test_no_other_file_system_is_asked_about_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer, of a server that is not there, say, would keep the receiver waiting for ever."""
    shared_ring._mount_and_device_of_memory()
    file = regular_file(tmp_path)
    try:
        with monkeypatch.context() as patch:
            for call in ("fstat", "pread", "pwrite"):
                patch.setattr(os, call, lambda *_: pytest.fail("the file system is asked"))
            with pytest.raises(ProtocolError, match="not a file in memory"):
                RingReader(RingOffer(b"t" * 16, os.getpid(), file, 1))
    finally:
        os.close(file)


@pytest.mark.parametrize(("pid", "descriptor"), [(1, 0), (0, 0), (2**22 + 1, 3), (2**64 - 1, 2**64 - 1), (None, 10**6)])
def test_a_process_or_descriptor_that_is_not_there_is_no_ring(pid: int | None, descriptor: int) -> None:
    with pytest.raises((ProtocolError, OSError)):
        RingReader(RingOffer(b"t" * 16, os.getpid() if pid is None else pid, descriptor, 1))


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm to write to")
def test_a_file_of_shared_memory_that_has_a_name_is_no_ring() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write((b"t" * 16).ljust(END))
        file.flush()
        with pytest.raises(ProtocolError, match="not a file in memory"):
            RingReader(RingOffer(b"t" * 16, os.getpid(), file.fileno(), 1))


class Runtime:
    """Stands in for CUDA's."""

    def __init__(self, result: int) -> None:
        self.result = result
        self.calls: list[tuple[str, int]] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        self.calls.append(("register", num_bytes))
        return self.result

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", 0))
        return 0


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a CUDA device."""

    is_cuda = True
    is_cpu = False


@pytest.mark.parametrize(("result", "calls"), [(0, ["register", "unregister"]), (801, ["register"])])
def test_the_first_tensor_on_a_gpu_pins_the_ring(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, result: int, calls: list[str]
) -> None:
    runtime = Runtime(result)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    written(ends, 64)
    assert runtime.calls == []
    for _ in range(2):
        tensor = torch.arange(6.0).view(2, 3).T.as_subclass(OnDevice)
        place = ends.writer.write([tensor])
        assert place is not None
        assert torch.equal(ends.read(place, [torch.empty(3, 2)])[0], torch.arange(6.0).view(2, 3).T)
    ends.writer.close()
    assert [call for call, _ in runtime.calls] == calls  # nothing once the ring is closed
    assert runtime.calls[0][1] == END


def test_only_memory_that_is_kept_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, ends = Runtime(0), Ends(4 * CAPACITY, CAPACITY)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    try:
        for size, calls in ((CAPACITY + 1, []), (CAPACITY, [("register", END)]), (CAPACITY + 1, [("register", END)])):
            place = ends.writer.write([numbered(size).as_subclass(OnDevice)])
            assert place is not None
            assert torch.equal(ends.read(place, [numbered(size)])[0], numbered(size))
            assert runtime.calls == calls
    finally:
        ends.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_go_straight_into_the_ring() -> None:
    ends = Ends(1 << 20)
    try:
        for tensor in (torch.randn(300, 200, device="cuda"), torch.randn(300, 200, device="cuda").bfloat16().T):
            place = ends.writer.write([tensor])
            assert place is not None
            assert torch.equal(ends.read(place, [tensor.cpu()])[0], tensor.cpu())
        assert ends.writer._pinned is not None
        assert ends.writer._pinned._is_registered
    finally:
        ends.close()


def test_a_mailbox_keeps_two_rings_of_a_sender_and_none_of_one_that_is_withdrawn() -> None:
    rings, writers = Rings(is_used=True), [RingWriter("b", CAPACITY) for _ in range(4)]
    offers = []
    for writer in writers:
        writer.write([])
        offer = writer.pop_offer()
        assert offer is not None
        offers.append(offer)
        rings.open_reader("key", offer)
        rings.open_reader("key", offer)
    assert list(rings.readers["key"]) == [offer.token for offer in offers[-2:]]
    rings.open_reader("key", offers[-1]._replace(pid=2**70))
    assert len(rings.readers["key"]) == 2
    rings.open_reader("other", offers[0])
    rings.close_readers("key")
    rings.close_readers("nobody")
    assert list(rings.readers) == ["other"]
    rings.close()
    assert not rings.readers
    for writer in writers:
        writer.close()


def test_a_ring_of_a_process_that_has_ended_is_closed_when_another_is_opened(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    rings, other = Rings(is_used=True), Ends()
    rings.open_reader("ended", ends.offer)
    with monkeypatch.context() as patch:
        patch.setattr(RingReader, "has_sender", False)
        rings.open_reader("other", other.offer)
    assert list(rings.readers) == ["other"]
    rings.close_writer("nobody")
    assert list(rings.readers) == ["other"]
    rings.close()
    other.close()


def test_rings_that_are_not_used_are_neither_made_nor_opened(ends: Ends) -> None:
    rings = Rings(is_used=False)
    rings.add_writer("b")
    rings.open_reader("key", ends.offer)
    rings.close_writer("b")
    assert (rings.writers, rings.readers) == ({}, {})


def test_a_ring_is_not_inherited_by_programs(ends: Ends) -> None:
    assert not os.get_inheritable(ends.offer.descriptor)
    assert not os.get_inheritable(ends.reader._file)
    assert mmap.PAGESIZE <= shared_ring._FIRST_OFFSET

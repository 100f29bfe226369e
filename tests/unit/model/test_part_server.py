"""Parts of files go to whom they may go to, a few at a time, and files are closed when nobody needs them any more."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest

from lingualinked.errors import CheckpointError, ProtocolError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.byte_ranges import PART_BYTES, ByteRange, checksum_bytes
from lingualinked.model.weight_files.part_server import PartServer, ServedPart
from lingualinked.model.weight_files.shared_parts import MAX_PARTS_IN_FLIGHT, SharedParts

SPEC = ModelSpec(
    class_name="LlamaForCausalLM",
    config_json="{}",
    dtype="bfloat16",
    attn_implementation=None,
    load_format="safetensors",
    files=(),
)
RANGES = [ByteRange(0, 100, 200), ByteRange(0, 400, 3 * PART_BYTES), ByteRange(2, 0, 10)]


class Memory:
    """Files in memory, which say whether they have been closed."""

    held = (ByteRange(0, 0, 4 * PART_BYTES), ByteRange(2, 0, 10))

    def __init__(self) -> None:
        self.closed = False

    def read(self, part: ByteRange) -> bytes:
        if part.start == 150:
            raise CheckpointError("the file has changed")
        return bytes([part.start % 251]) * part.num_bytes

    def close(self) -> None:
        self.closed = True


class Line:
    """A server, and what it has sent."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[tuple[str, ServedPart, Callable[[], None]]] = queue.SimpleQueue()
        self.opened: list[Memory] = []
        self.server = PartServer(self.open, lambda *sent: self.sent.put(sent))

    def open(self, spec: ModelSpec) -> Memory:
        self.opened.append(Memory())
        return self.opened[-1]

    def next_part(self) -> ServedPart:
        name, part, on_sent = self.sent.get(timeout=60)
        assert name == "b"
        on_sent()
        return part


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.server.close()


def test_a_part_is_sent_with_its_checksum_or_the_reason(line: Line) -> None:
    line.server.share(7, "b", SPEC, RANGES)
    line.server.request_part(7, "b", ByteRange(0, 100, 110), 0)
    line.server.request_part(7, "b", ByteRange(0, 150, 160), 0)
    part, failed = line.next_part(), line.next_part()
    assert bytes(part.data[0].tolist()) == bytes([100]) * 10
    assert part.checksum == checksum_bytes(bytes([100]) * 10)
    assert (failed.data, failed.error) == ((), "the file has changed")


def test_the_next_part_is_read_once_the_one_before_has_left(line: Line) -> None:
    line.server.share(7, "b", SPEC, RANGES)
    for start in (100, 110):
        line.server.request_part(7, "b", ByteRange(0, start, start + 10), 0)
    _, _, on_sent = line.sent.get(timeout=60)
    with pytest.raises(queue.Empty):
        line.sent.get(timeout=0.05)
    on_sent()
    line.next_part()


def test_files_are_closed_when_nobody_may_fetch_them_any_more(line: Line) -> None:
    for load in (7, 8):
        line.server.share(load, "b", SPEC, RANGES)
        line.server.request_part(load, "b", ByteRange(0, 100, 110), 0)
        line.next_part()
    thread = line.server._thread
    assert thread is not None
    line.server.end_sharing(7, "b")
    assert line.server.borrowers(8) == ("b",)
    line.server.end_sharing(8, "b")
    thread.join(60)
    assert [each.closed for each in line.opened] == [True]
    with pytest.raises(ProtocolError, match="may fetch nothing here for the load 7"):
        line.server.request_part(7, "b", ByteRange(0, 100, 110), 0)


def test_what_is_held_is_found(line: Line) -> None:
    found: queue.SimpleQueue[tuple[ByteRange, ...]] = queue.SimpleQueue()
    line.server.find_held(SPEC, found.put)
    assert found.get(timeout=60) == Memory.held


@pytest.mark.parametrize(
    "part",
    [
        ByteRange(0, 90, 110),
        ByteRange(0, 190, 210),
        ByteRange(0, 250, 260),
        ByteRange(1, 0, 10),
        ByteRange(2, 0, 11),
        ByteRange(0, 400, 400),
        ByteRange(0, 410, 405),
    ],
)
def test_what_belongs_to_no_tensor_of_the_span_is_refused(part: ByteRange) -> None:
    with pytest.raises(ProtocolError, match="which belong to no tensor of the layers that the worker is to load"):
        SharedParts(RANGES).admit(part, 0)


def test_only_so_many_parts_are_in_flight() -> None:
    shared = SharedParts(RANGES)
    with pytest.raises(ProtocolError, match="the limit is 1048576"):
        shared.admit(ByteRange(0, 400, 401 + PART_BYTES), 0)
    receipts = [shared.admit(RANGES[0], 0) for _ in range(MAX_PARTS_IN_FLIGHT)]
    for receipt in (0, 5):
        with pytest.raises(ProtocolError, match="before one of the 4 before it had been received"):
            shared.admit(RANGES[0], receipt)
    shared.admit(RANGES[0], receipts[0])
    with pytest.raises(ProtocolError):
        shared.admit(RANGES[0], receipts[0])

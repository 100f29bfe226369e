"""Parts come from every source that has them, and from the others where one fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from lingualinked.model.weight_files.byte_ranges import ByteRange, checksum_bytes, num_bytes_of
from lingualinked.model.weight_files.fetching import FetchError
from lingualinked.model.weight_files.shared_parts import MAX_PARTS_IN_FLIGHT, SharedParts
from lingualinked.protocol.weights import FilePart, WeightSupply
from lingualinked.worker.weights.part_fetcher import PartFetcher

MIB = 1 << 20
FILES = [bytes(torch.randint(256, (5 * MIB + 17,), dtype=torch.uint8).tolist()), bytes(range(256)) * 16_384]
ALL = (ByteRange(0, 100, len(FILES[0])), ByteRange(1, 0, len(FILES[1])))


class Sources:
    """Sources that answer as soon as they are asked, each in its own way."""

    def __init__(self, *supplies: WeightSupply) -> None:
        self.asked: Counter[str] = Counter()
        self.answers: dict[str, Callable[[ByteRange], tuple[bytes, int, str] | None]] = {}
        self.shared = {each.name: SharedParts(ALL) for each in supplies}
        self.now = 0.0
        self.is_busy = False
        self.fetcher = PartFetcher(
            supplies, ["a.safetensors", "b.safetensors"], self.request, self.call, lambda: self.now
        )
        self.got: dict[ByteRange, bytes] = {}

    def call(self, callback: Callable[[], None]) -> None:
        """The loop, unless a step holds it up."""
        if not self.is_busy:
            callback()

    def request(self, source: str, part: ByteRange, receipt: int) -> None:
        self.asked[source] += 1
        new = self.shared[source].admit(part, receipt)  # raises if more is in flight than may be
        answer = self.answers.get(source, right)(part)
        if answer is None:
            self.now += 1.0
            return
        data, checksum, error = answer
        message = FilePart(
            load=1,
            file=part.file,
            start=part.start,
            num_bytes=part.num_bytes,
            checksum=checksum,
            error=error,
            receipt=new,
        )
        self.fetcher.deliver_part(
            source, message, torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None
        )

    def deliver(self, part: ByteRange, data: bytes | bytearray | memoryview) -> None:
        assert part not in self.got
        self.got[part] = bytes(data)

    def fetch(self, *ranges: ByteRange) -> None:
        self.fetcher.fetch(ranges or ALL, self.deliver)
        assert num_bytes_of(self.got) >= num_bytes_of(ranges or ALL)
        assert all(data == FILES[part.file][part.start : part.stop] for part, data in self.got.items())


def right(part: ByteRange) -> tuple[bytes, int, str]:
    data = FILES[part.file][part.start : part.stop]
    return data, checksum_bytes(data), ""


def supply(name: str, *ranges: ByteRange) -> WeightSupply:
    return WeightSupply(name=name, ranges=tuple((each.file, each.start, each.stop) for each in ranges) or None)


def test_all_sources_send_and_nothing_comes_twice() -> None:
    sources = Sources(supply("caller"), supply("a", ByteRange(0, 0, 3 * MIB)), supply("b", ByteRange(1, 0, 4 * MIB)))
    sources.fetch()
    assert all(sources.asked[name] > 0 for name in ("caller", "a", "b"))
    assert sum(sources.asked.values()) == len(sources.got)


def test_several_batches_share_what_may_be_in_flight() -> None:
    sources = Sources(supply("caller"))
    for start in range(0, 4 * MIB, MIB // 2):
        sources.fetch(ByteRange(1, start, start + MIB // 2))
    assert sources.asked["caller"] == 8


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda part: (right(part)[0], 1, ""), "or others than its checksum says"),
        (lambda part: (b"short", checksum_bytes(b"short"), ""), "sent 5 bytes for"),
        (lambda part: (b"", 0, "no longer in its cache"), "no longer in its cache"),
        (lambda part: None, "did not answer within"),
    ],
    ids=["damaged", "short", "refused", "silent"],
)
def test_a_source_that_fails_is_replaced_and_named_if_no_other_is_left(
    answer: Callable[[ByteRange], tuple[bytes, int, str] | None], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingualinked.worker.weights.part_fetcher._TURN_S", 0.001)
    monkeypatch.setattr("lingualinked.worker.weights.part_fetcher._SILENT_S", 3.0)
    sources = Sources(supply("bad"), supply("good"))
    sources.answers["bad"] = answer
    tick = iter(range(10**9))
    sources.fetcher._clock = lambda: float(next(tick))
    sources.fetch()
    assert sources.asked["bad"] <= MAX_PARTS_IN_FLIGHT
    sources.fetcher.lose_source("good", "has ended: it was killed")
    with pytest.raises(FetchError, match=rf"device 'bad' .*{why}.*; device 'good' has ended: it was killed") as caught:
        sources.fetch(ByteRange(1, 0, 10))
    assert "bytes [0, 10) of b.safetensors can't be fetched" in str(caught.value)


def test_a_source_is_not_replaced_while_its_answers_wait_in_this_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.worker.weights.part_fetcher._TURN_S", 0.001)
    sources = Sources(supply("slow"), supply("other"))
    for name in ("slow", "other"):
        sources.answers[name] = lambda part: None
    sources.is_busy = True
    turns = iter(range(100))

    def check_wanted() -> None:
        sources.now += 10.0
        if next(turns) == 99:
            raise KeyError

    sources.fetcher.check_wanted = check_wanted
    with pytest.raises(KeyError):
        sources.fetch()
    assert not any(source.failure for source in sources.fetcher._sources.values())


def test_what_nobody_has_is_named() -> None:
    sources = Sources(supply("a", ByteRange(0, 0, 200)))
    with pytest.raises(FetchError, match=r"bytes \[200, 300\) of a.safetensors can't be fetched: no party has them"):
        sources.fetch(ByteRange(0, 100, 300))


def test_it_ends_once_the_stage_is_not_wanted() -> None:
    sources = Sources(supply("caller"))

    def not_wanted() -> None:
        raise KeyError

    sources.fetcher.check_wanted = not_wanted
    with pytest.raises(KeyError):
        sources.fetch()

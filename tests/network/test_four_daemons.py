"""A caller and four daemons at 100 Mbit/s each: tokens through every move, and every byte that is counted for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from network.capture import Capture
from network.conftest import make_network
from network.hosts import Host, Network, Traffic
from network.lab import CLOSE, GENERATE, OPEN, log
from network.machines import Caller, CallerError, Daemon, own_key
from network.uncut import PROMPT, Uncut

pytestmark = pytest.mark.lengthy

RATE = "100mbit"
NAMES = ["attic-nas", "cellar-pi", "desk-pc", "sofa-laptop"]
SPANS = [("attic-nas", 0, 2), ("cellar-pi", 2, 4), ("desk-pc", 4, 6), ("sofa-laptop", 6, 8)]
MOVED = [("attic-nas", 0, 1), ("cellar-pi", 1, 4), ("desk-pc", 4, 7), ("sofa-laptop", 7, 8)]
STEP_BYTES, STAGE_BYTES = 134, 18
"""Of a decode step on the wire beside its hidden states, and more for each stage so far, at most: see docs/protocol.md."""

WIRE = 1.02
"""Bytes on the wire for a byte of weights, at most."""


class House:
    """A caller with the checkpoint, and four daemons without."""

    def __init__(self, network: Network, checkpoint: Path) -> None:
        self.network = network
        self.checkpoint = checkpoint
        self.laptop = network.add("laptop", rate=RATE)
        key = own_key(self.laptop)
        self.hosts = [network.add(name, rate=RATE) for name in NAMES]
        for host in self.hosts:
            host.hidden.append(checkpoint)
        self.daemons = [Daemon(host, clients=[key]) for host in self.hosts]
        for daemon in self.daemons:
            daemon.wait()
        self.caller = Caller(self.laptop)
        self.caller.run("")

    def open(self) -> None:
        devices = ", ".join(daemon.device() for daemon in self.daemons)
        self.caller.run(OPEN.format(devices=devices), path=str(self.checkpoint), spans=SPANS)

    def tokens(self, num_new: int = 12) -> list[int]:
        return self.caller.run(GENERATE, num_new=num_new, prompt=PROMPT)

    def traffic(self) -> dict[str, Traffic]:
        return {host.name: host.traffic() for host in self.hosts}

    def received_since(self, before: dict[str, Traffic]) -> dict[str, int]:
        now = self.traffic()
        return {name: (now[name] - before[name]).received_payload_bytes for name in now}


@pytest.fixture(scope="module")
def started_house(nothing_outlives_the_session: None, large_checkpoint: Path) -> Iterator[House]:
    with make_network() as network:
        yield House(network, large_checkpoint)


@pytest.fixture
def house(started_house: House) -> Iterator[House]:
    yield started_house
    with contextlib.suppress(CallerError):  # nothing is open
        started_house.caller.run(CLOSE)


def test_weights_cross_the_wire_once_and_tokens_stay_the_same_through_every_move(
    house: House, uncut_large: Uncut
) -> None:
    expected = uncut_large.tokens(12)
    # 1) a first start: each host gets its span
    before = house.traffic()
    house.open()
    received = house.received_since(before)
    for name, start, end in SPANS:
        span = uncut_large.span_bytes(start, end)
        log.info(f"{name}: received {received[name]} for a span of {span} bytes: {received[name] / span:.4f}")
        assert span <= received[name] <= WIRE * span
    assert house.tokens() == expected
    # 2) a rebalance: each host gets what it has not had
    before = house.traffic()
    house.caller.run("model.rebalance(ll.Plan.from_spans([tuple(each) for each in spans]))", spans=MOVED)
    received = house.received_since(before)
    for (name, start, end), (_, old_start, old_end) in zip(MOVED, SPANS, strict=True):
        missing = uncut_large.span_bytes(start, end) - uncut_large.span_bytes(max(start, old_start), min(end, old_end))
        log.info(f"{name}: received {received[name]} for {missing} missing bytes of weights")
        assert received[name] <= WIRE * missing + (256 << 10)  # steps' and moves' own messages
    assert house.tokens() == expected
    # 3) a device is released, and admitted again
    house.caller.run("result = str(model.release('cellar-pi'))")
    assert "cellar-pi" not in house.caller.run("result = [stage.device for stage in model.plan.stages]")
    assert house.tokens() == expected
    house.caller.run("result = str(model.admit('cellar-pi'))")
    assert house.tokens() == expected
    # 4) a second start: nothing is sent again
    house.caller.run(CLOSE)
    before = house.traffic()
    house.open()
    received = house.received_since(before)
    log.info(f"a second start: received {received}")
    assert max(received.values()) < 100_000
    assert house.tokens() == expected


def test_a_decode_step_costs_the_bytes_that_the_protocol_page_says(house: House, uncut_large: Uncut) -> None:
    house.open()
    house.tokens(4)
    few, many = (bytes_between(house, num_new) for num_new in (16, 144))
    hidden = 2 * uncut_large.model.config.hidden_size
    for number, pair in enumerate(zip(house.hosts, house.hosts[1:], strict=False)):
        key = tuple(host.name for host in pair)
        per_step = (many[key] - few[key]) / 128
        log.info(
            f"{key}: {per_step:.1f} bytes per decode step beside {hidden} of hidden states: {per_step - hidden:.1f}"
        )
        assert hidden < per_step <= hidden + STEP_BYTES + STAGE_BYTES * (number + 1)


def bytes_between(house: House, num_new: int) -> dict[tuple[str, ...], int]:
    """Return what each stage's host sends to the next one's for a text."""
    with house.network.capture() as capture:
        house.tokens(num_new)
    assert capture.num_lost == 0
    return {
        (source.name, target.name): sent_between(capture, source, target)
        for source, target in zip(house.hosts, house.hosts[1:], strict=False)
    }


def sent_between(capture: Capture, source: Host, target: Host) -> int:
    return sum(
        len(stream)
        for flow, stream in capture.flows().items()
        if (flow.source, flow.target) == (source.address, target.address)
    )

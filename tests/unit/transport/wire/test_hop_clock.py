"""A message's delay is split into travel and waiting."""

from __future__ import annotations

import pytest

from lingualinked.transport.wire import hop_clock
from lingualinked.transport.wire.hop_clock import HopClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The receiver's clock in microseconds, which a test sets."""
    clock = [0]
    monkeypatch.setattr(hop_clock.time, "monotonic_ns", lambda: clock[0] * 1000)
    monkeypatch.setattr(hop_clock.time, "monotonic", lambda: clock[0] / 1e6)
    return clock


def test_what_is_beyond_the_shortest_delay_is_waiting(now: list[int]) -> None:
    hops, seen = HopClock(), []
    for sent_us, delay_us in ((1000, 300), (5000, 250), (9000, 4250), (20_000, 250)):
        now[0] = sent_us + delay_us
        seen.append(hops.split_delay("a", sent_us, 0.0))
    assert seen == [(300, 0), (250, 0), (250, 4000), (250, 0)]


def test_senders_are_told_apart(now: list[int]) -> None:
    hops = HopClock()
    now[0] = 10_100
    assert hops.split_delay("near", 10_000, 0.0) == (100, 0)
    assert hops.split_delay("far", 2_000, 0.0) == (8_100, 0)


def test_a_way_that_has_become_longer_is_believed_after_a_while(now: list[int]) -> None:
    hops = HopClock()
    for number in range(100):
        delay_us = 100 if number < 10 else 700
        now[0] = 10_000 * number + delay_us
        parts = hops.split_delay("a", 10_000 * number, 0.0)
    assert parts == (700, 0)


def test_clocks_that_differ_give_waiting_all_the_same(now: list[int]) -> None:
    hops = HopClock()
    for sent_us in (9_000_000, 9_500_000):  # ahead of the receiver's
        now[0] = sent_us - 5_000_000 + 200
        assert hops.split_delay("a", sent_us, 0.0) == (0, 0)
    now[0] += 500_000 + 3_000
    assert hops.split_delay("a", 10_000_000, 0.0) == (0, 3_000)


def test_the_clock_may_start_anew_on_the_way(now: list[int]) -> None:
    now[0] = 2**32 + 150
    assert HopClock().split_delay("a", 2**32 - 50, 0.0) == (200, 0)


def test_an_emulated_link_says_when_a_message_was_due(now: list[int]) -> None:
    now[0] = 1_009_000
    assert HopClock().split_delay("a", 1_000_000, 1.005) == (5_000, 4_000)


def test_decoding_is_neither(now: list[int]) -> None:
    now[0] = 10_000
    assert HopClock().split_delay("a", 9_000, 0.0, decode_s=4e-4) == (600, 0)


def test_between_hosts_only_the_waiting_is_known(now: list[int]) -> None:
    hops = HopClock()
    for sent_us, delay_us, expected in ((1000, 300, 0), (5000, 900, 600), (9000, 250, 0), (20_000, 1250, 1000)):
        now[0] = 2_000_000_000 + sent_us + delay_us  # half an hour apart
        assert hops.split_delay("a", sent_us, 0.0, same_host=False) == (None, expected)

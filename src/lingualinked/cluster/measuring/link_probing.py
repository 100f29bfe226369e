"""Makes the parties of a cluster measure their links: round trips of small and large messages, each timed on one clock.

Knows messages and plain data; not what is to travel on a link.
"""

from __future__ import annotations

import concurrent.futures
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from lingualinked.cluster.messaging.pending import result_of, results_of
from lingualinked.cluster.workers.emulation import emulated_link
from lingualinked.device import CALLER, Device, Link
from lingualinked.link_profile import LinkProfile
from lingualinked.protocol.measuring import LinkProbed, PingWorker, ProbeLink

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster

_SMALL_BYTES, _LARGE_BYTES = 64, 256 << 10
_NUM_SMALL, _NUM_LARGE = 7, 3
_LONGEST_PROBE_S = 0.05  # that one large message may be on an emulated link
# On a network, a message has to be on its way for some time before the rate is that of the link.
_FIRST_BYTES, _MOST_BYTES, _LONG_ENOUGH_S = 64 << 10, 4 << 20, 0.05

Pair = tuple[str, str]
"""Two parties of a cluster, by name."""


def measure_links(
    cluster: Cluster, pairs: Sequence[Pair], known: Sequence[LinkProfile] = ()
) -> tuple[LinkProfile, ...]:
    """Measure the links between pairs of parties, there and back.

    Links within one host differ in what is emulated alone, and what those that are alike have shown is taken together,
    with what is ``known`` from before. Every other link is measured for itself and in each direction, while no other
    pair uses the network of its two hosts.
    """
    hosts = {name: each.host_id for name, each in cluster._engine.environments().items()}  # noqa: SLF001 - within the room
    near = [pair for pair in pairs if hosts[pair[0]] == hosts[pair[1]]]
    far = [pair for pair in pairs if pair not in near]
    links = _measure_near(cluster, near, [each for each in known if hosts[each.source] == hosts[each.target]])
    for disjoint in rounds(far, hosts):
        with concurrent.futures.ThreadPoolExecutor(len(disjoint)) as threads:
            found = results_of([threads.submit(measure_pair, cluster, *pair) for pair in disjoint])
        links += [link for both in found for link in both]
    names = [CALLER, *(device.name for device in cluster.devices)]
    return tuple(sorted(links, key=lambda link: (names.index(link.source), names.index(link.target))))


def all_pairs(names: Sequence[str]) -> list[Pair]:
    """Return all pairs of parties, in an order in which neighbours have no party in common."""
    seats: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    pairs: list[Pair] = []
    for _ in range(len(seats) - 1):
        facing = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        pairs += [(left, right) for left, right in facing if left is not None and right is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return pairs


def rounds(pairs: Collection[Pair], places: Mapping[str, str]) -> Iterator[list[Pair]]:
    """Return pairs in rounds within which no place is that of two pairs."""
    left = list(pairs)
    while left:
        taken: set[str] = set()
        chosen = []
        for pair in left:
            if taken.isdisjoint(here := {places[name] for name in pair}):
                taken |= here
                chosen.append(pair)
        left = [pair for pair in left if pair not in chosen]
        yield chosen


def measure_pair(cluster: Cluster, one: str, other: str) -> tuple[LinkProfile, LinkProfile]:
    """Measure the links between two parties, first there and then back.

    Each end times messages until the other one has answered them: half a small one's time is taken to be the latency of
    either direction, and what a large one takes longer tells its direction's bandwidth.
    """
    directions = (one, other), (other, one)
    small_s = statistics.median(
        seconds
        for source, target in directions
        for seconds in _time_messages(cluster, source, target, (_SMALL_BYTES,) * _NUM_SMALL)[
            1:
        ]  # the first one connects
    )
    there, back = (
        LinkProfile(
            source=source,
            target=target,
            latency_s=small_s / 2,
            bandwidth_bytes_per_s=_bandwidth(cluster, source, target, small_s),
        )
        for source, target in directions
    )
    return there, back


def _bandwidth(cluster: Cluster, source: str, target: str, small_s: float) -> float | None:
    """Send ever larger messages until one takes long enough; None if the link is too fast to tell."""
    size = _FIRST_BYTES
    while True:
        seconds = statistics.median(_time_messages(cluster, source, target, (size,) * _NUM_LARGE)) - small_s
        if seconds >= _LONG_ENOUGH_S or size == _MOST_BYTES:
            return (size - _SMALL_BYTES) / seconds if seconds > 0 else None
        size *= 4


def _time_messages(cluster: Cluster, source: str, target: str, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return the seconds until each of some messages, sent one after another, is answered."""
    if source == CALLER:
        return tuple(_time_own_message(cluster, target, size) for size in sizes)
    return cast("LinkProbed", result_of(_probe(cluster, source, target, tuple(sizes)))).seconds


def _time_own_message(cluster: Cluster, target: str, size: int) -> float:
    import torch

    engine = cluster._engine  # noqa: SLF001 - within the room
    payload = torch.zeros(size, dtype=torch.uint8)
    answered_s: list[float] = []
    began_s = time.perf_counter()
    future = engine.request(
        target,
        PingWorker(request=engine.next_request()),
        "measuring the link from the caller",
        cluster.timeout_s,
        tensors=(payload,),
    )
    future.add_done_callback(lambda _: answered_s.append(time.perf_counter()))
    results_of([future])
    return answered_s[0] - began_s


def _measure_near(cluster: Cluster, pairs: Sequence[Pair], known: Sequence[LinkProfile]) -> list[LinkProfile]:
    """Measure links within one host, which are as slow back as there but for what is known to be emulated."""
    by_name: dict[str, Device | None] = {CALLER: None} | {device.name: device for device in cluster.devices}

    def likeness(source: str, target: str) -> Link:
        return emulated_link(by_name[source], by_name[target], cluster.links)

    latencies: defaultdict[Link, list[float]] = defaultdict(list)
    rates: defaultdict[Link, list[float]] = defaultdict(list)
    for each in known:
        link = likeness(each.source, each.target)
        latencies[link].append(each.latency_s)
        if each.bandwidth_bytes_per_s is not None:
            rates[link].append(each.bandwidth_bytes_per_s)
    ends: list[Pair] = []
    for disjoint in rounds(pairs, {name: name for name in by_name}):
        probes, futures = [], []
        for source, target in disjoint:
            ends += [(source, target), (target, source)]
            prober, other = (target, source) if source == CALLER else (source, target)
            bandwidth = likeness(prober, other).bandwidth_bytes_per_s
            large = int(max(4 * _SMALL_BYTES, min(_LARGE_BYTES, bandwidth * _LONGEST_PROBE_S)))
            probes.append((prober, other, large))
            futures.append(_probe(cluster, prober, other, (_SMALL_BYTES,) * _NUM_SMALL + (large,) * _NUM_LARGE))
        answers = cast("list[LinkProbed]", results_of(futures))
        for (prober, other, large), answer in zip(probes, answers, strict=True):
            seconds = answer.seconds
            small_s = statistics.median(seconds[1:_NUM_SMALL])  # the first one makes the connection
            large_s = statistics.median(seconds[_NUM_SMALL:])
            there, back = likeness(prober, other), likeness(other, prober)
            own_s = max(0.0, small_s - there.latency_s - back.latency_s) / 2
            for link in (there, back):
                latencies[link].append(own_s + link.latency_s)
            if large_s > small_s:
                rates[there].append((large - _SMALL_BYTES) / (large_s - small_s))
    return [_link_profile(source, target, likeness(source, target), latencies, rates) for source, target in ends]


def _link_profile(
    source: str, target: str, link: Link, latencies: dict[Link, list[float]], rates: dict[Link, list[float]]
) -> LinkProfile:
    stated = [] if link.bandwidth_bytes_per_s == math.inf else [link.bandwidth_bytes_per_s]
    measured = rates.get(link) or stated
    return LinkProfile(
        source=source,
        target=target,
        latency_s=statistics.median(latencies[link]),
        bandwidth_bytes_per_s=statistics.median(measured) if measured else None,
    )


def _probe(cluster: Cluster, source: str, target: str, sizes: tuple[int, ...]) -> concurrent.futures.Future[object]:
    engine = cluster._engine  # noqa: SLF001 - within the room
    return engine.request(
        source,
        ProbeLink(request=engine.next_request(), target=target, sizes=sizes),
        f"measuring the link to {target!r}",
        cluster.timeout_s,
        helpers=() if target == CALLER else [target],
    )

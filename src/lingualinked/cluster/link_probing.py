"""Asks the workers of a cluster to measure their links, and takes together what links that are alike have shown.

Knows messages and plain data; not what is to travel on a link.
"""

from __future__ import annotations

import concurrent.futures
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from lingualinked.cluster.pending import results_of
from lingualinked.device import CALLER, Device, Link, link_between
from lingualinked.link_profile import LinkProfile
from lingualinked.protocol.measuring import LinkProbed, ProbeLink

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster

_SMALL_BYTES, _LARGE_BYTES = 64, 256 << 10
_NUM_SMALL, _NUM_LARGE = 7, 3
_LONGEST_PROBE_S = 0.05  # that one large message may be on an emulated link


def measure_links(
    cluster: Cluster, rounds: Iterable[Sequence[tuple[str, str]]], known: Sequence[LinkProfile] = ()
) -> tuple[LinkProfile, ...]:
    """Probe pairs of parties, those of one round at the same time; return their links, there and back.

    A link is taken to be as slow back as there, but for what is known to be emulated. What is ``known`` from before
    counts for links that are alike.
    """
    by_name: dict[str, Device | None] = {CALLER: None} | {device.name: device for device in cluster.devices}

    def likeness(source: str, target: str) -> Link:
        return link_between(by_name[source], by_name[target], cluster.links)

    latencies: defaultdict[Link, list[float]] = defaultdict(list)
    rates: defaultdict[Link, list[float]] = defaultdict(list)
    for each in known:
        link = likeness(each.source, each.target)
        latencies[link].append(each.latency_s)
        if each.bandwidth_bytes_per_s is not None:
            rates[link].append(each.bandwidth_bytes_per_s)
    ends: list[tuple[str, str]] = []
    for pairs in rounds:
        probes, futures = [], []
        for source, target in pairs:
            ends += [(source, target), (target, source)]
            prober, other = (target, source) if source == CALLER else (source, target)
            bandwidth = likeness(prober, other).bandwidth_bytes_per_s
            large = int(max(4 * _SMALL_BYTES, min(_LARGE_BYTES, bandwidth * _LONGEST_PROBE_S)))
            sizes = (_SMALL_BYTES,) * _NUM_SMALL + (large,) * _NUM_LARGE
            probes.append((prober, other, large))
            futures.append(_probe(cluster, prober, other, sizes))
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
    order = {name: position for position, name in enumerate(by_name)}
    ends.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
    return tuple(_link_profile(source, target, likeness(source, target), latencies, rates) for source, target in ends)


def tournament(names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Return all pairs in rounds of disjoint pairs: each party is in one pair at a time."""
    seats: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        yield [(left, right) for left, right in pairs if left is not None and right is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


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

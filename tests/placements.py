"""An oracle for placements: every one of a small problem, and the best along an order, by means of their own.

Knows the problem's definition alone; shares no table and no recursion with the solver.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from lingualinked.planning.placement.problem import Placement, Problem, Span
from lingualinked.planning.placement.shortcuts import ShortcutCosts, Shortcuts


@dataclasses.dataclass(frozen=True)
class Judged:
    """A placement that fits, and its values."""

    placement: Placement
    bottleneck_s: float
    latency_s: float
    energy_j: float
    interval_s: float


def draw_problem(
    seed: int,
    num_layers: int,
    num_devices: int,
    *,
    whole: bool = False,
    tight: bool = False,
    gaps: bool = False,
    rings: bool = True,
    spread: bool = False,
    num_sessions: float = math.inf,
    kept: tuple[int, int] = (1, 1),
) -> Problem:
    """Draw numbers: whole ones (many ties), tight memory, missing permissions and links, rings, costs of all magnitudes."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, high: float = 10.0) -> np.ndarray:
        if spread:
            return np.asarray(10.0 ** rng.uniform(-12, 6, shape))
        return rng.integers(0, int(high) + 1, shape).astype(float) if whole else rng.uniform(0, high, shape)

    layer_bytes = rng.integers(1, 20, num_layers).astype(float)
    ends = rng.integers(0, 30, 2).astype(float)
    capacity = layer_bytes.sum() * rng.uniform(0.15, 0.8 if tight else 3, num_devices) + rng.integers(
        0, 40, num_devices
    )
    capacity = np.where(rng.random(num_devices) < (0.1 if tight else 0.4), np.inf, capacity.round())
    hop_s, busy_s = draw(num_devices, num_devices), draw(num_devices, num_devices, high=15)
    enter_s, leave_s = draw(num_devices, high=5), draw(num_devices, high=5)
    missing = 0.3 if gaps else 0.0
    rng_gaps = np.random.default_rng([seed, 1])
    hop_s[rng_gaps.random(hop_s.shape) < missing] = enter_s[rng_gaps.random(num_devices) < missing / 3] = np.inf
    capacity[rng_gaps.random(num_devices) < missing / 3] = 0.0
    return Problem(
        names=tuple(f"d{index}" for index in range(num_devices)),
        layer_s=draw(num_devices, num_layers) + (0 if spread else 1 if whole else 0.01),
        stage_s=draw(num_devices, high=3),
        first_s=draw(num_devices, high=4),
        last_s=draw(num_devices, high=8),
        hop_s=hop_s,
        busy_s=busy_s,
        enter_s=enter_s,
        enter_busy_s=draw(num_devices, high=8),
        leave_s=leave_s,
        leave_busy_s=draw(num_devices, high=8),
        layer_bytes=layer_bytes,
        stage_bytes=rng.integers(0, 4, num_devices).astype(float),
        first_bytes=float(ends[0]),
        last_bytes=float(ends[1]),
        tied_bytes=float(rng.integers(0, int(ends.min()) + 1)),
        capacity_bytes=capacity,
        may_be_first=rng.random(num_devices) >= missing,
        may_be_last=rng.random(num_devices) >= missing,
        may_close=(rng.random(num_devices) < 0.6) & rings,
        watts=draw(num_devices, high=20),
        num_sessions=num_sessions,
        num_front=min(kept[0], num_layers),
        num_back=min(kept[1], num_layers),
    )


def with_transmission(
    problem: Problem, seed: int, *, num_shortcuts: int, num_cuts: int, alike: bool = False
) -> Problem:
    """Add shortcuts and forbidden cuts; where links are alike, a shortcut takes as long over every one."""
    rng = np.random.default_rng(seed)
    num_devices, num_layers = problem.num_devices, problem.num_layers
    costs = []
    for index in range(num_shortcuts):
        made_at = int(rng.integers(0, num_layers)) if index % 3 == 2 else 0
        used_at = np.flatnonzero(rng.random(num_layers + 1) < 0.4)
        used_at = used_at[used_at > made_at] if (used_at > made_at).any() else np.array([num_layers])
        send_s = np.full((num_devices, num_devices), rng.uniform(0, 8))
        send_s = send_s if alike else rng.uniform(0, 8, (num_devices, num_devices))
        costs.append(
            ShortcutCosts(
                made_at=made_at,
                used_at=tuple(used_at.tolist()),
                send_s=send_s,
                shows_text=index == 1 and made_at == 0,
            )
        )
    shortcuts = Shortcuts(
        costs=tuple(costs),
        makers={each.made_at: np.ones(num_devices, dtype=bool) for each in costs},
    )
    cuts = rng.choice(np.arange(1, num_layers), min(num_cuts, num_layers - 1), replace=False)
    return dataclasses.replace(
        problem, shortcuts=shortcuts if costs else None, forbidden_cuts=tuple(sorted(cuts.tolist()))
    )


def sequences(problem: Problem, order: tuple[int, ...] | None = None) -> Iterator[tuple[int, ...]]:
    """Give the devices of every pipeline: any subset in any order, or in a given one; closed to a ring or not."""
    devices = range(problem.num_devices) if order is None else order
    for size in range(1, len(devices) + 1):
        for chosen in itertools.permutations(devices, size) if order is None else itertools.combinations(devices, size):
            yield chosen
            if size > 1 and problem.may_close[chosen[0]]:
                yield (*chosen, chosen[0])


def every_placement(problem: Problem, order: tuple[int, ...] | None = None) -> list[Judged]:
    """Judge every placement that memory, links and permissions allow."""
    num_layers = problem.num_layers
    layer_bytes, layer_s = problem.layer_bytes.tolist(), problem.layer_s.tolist()
    judged = []
    for chosen in sequences(problem, order):
        first, last = chosen[0], chosen[-1]
        links = list(itertools.pairwise(chosen))
        hops = sum(problem.hop_s[a, b] for a, b in links) + problem.enter_s[first] + problem.leave_s[last]
        if not (problem.may_be_first[first] and problem.may_be_last[last] and hops < math.inf):
            continue
        busy_ends = problem.enter_busy_s[first], problem.leave_busy_s[last]
        busy_links = {(a, b): float(problem.busy_s[a, b]) for a, b in links}
        allowed = [layer for layer in range(1, num_layers) if layer not in problem.forbidden_cuts]
        for cuts in itertools.combinations(allowed, len(chosen) - 1):
            bounds = list(itertools.pairwise([0, *cuts, num_layers]))
            if any(
                (start < problem.num_front and not problem.may_be_first[device])
                or (end > num_layers - problem.num_back and not problem.may_be_last[device])
                for device, (start, end) in zip(chosen, bounds, strict=True)
            ):
                continue
            seconds = dict.fromkeys(chosen, 0.0)
            held = dict.fromkeys(chosen, 0.0)
            for device, (start, end) in zip(chosen, bounds, strict=True):
                seconds[device] += sum(layer_s[device][start:end]) + problem.stage_s[device]
                held[device] += sum(layer_bytes[start:end]) + problem.stage_bytes[device]
            seconds[first] += problem.first_s[first]
            seconds[last] += problem.last_s[last]
            held[first] += problem.first_bytes
            held[last] += problem.last_bytes - (problem.tied_bytes if first == last else 0)
            if any(held[device] > problem.capacity_bytes[device] for device in seconds):
                continue
            shortcuts = [] if problem.shortcuts is None else _shortcuts(problem, problem.shortcuts, chosen, bounds)
            if shortcuts is None:
                continue
            carried = dict(busy_links)
            for link, sent_s in shortcuts:
                carried[link] = carried.get(link, 0.0) + sent_s
            busiest = max(*busy_ends, *carried.values(), *seconds.values())
            latency = sum(seconds.values()) + hops + sum(sent_s for _, sent_s in shortcuts)
            judged.append(
                Judged(
                    tuple(Span(device, *bound) for device, bound in zip(chosen, bounds, strict=True)),
                    float(busiest),
                    float(latency),
                    float(sum(problem.watts[device] * spent for device, spent in seconds.items())),
                    float(max(busiest, latency / problem.num_sessions)),
                )
            )
    return judged


def _shortcuts(
    problem: Problem, shortcuts: Shortcuts, chosen: tuple[int, ...], bounds: list[tuple[int, int]]
) -> list[tuple[tuple[int, int], float]] | None:
    """List the links that carry shortcuts and for how long; None if ids would leave those who may see them."""
    lying = {layer: device for device, (start, end) in zip(chosen, bounds, strict=True) for layer in range(start, end)}
    sent = []
    for device, (start, end) in zip(chosen[1:], bounds[1:], strict=True):
        stage = {*range(start, end), *([problem.num_layers] if end == problem.num_layers else [])}
        wanted = [each for each in shortcuts.costs if each.made_at < start and stage.intersection(each.used_at)]
        if any(each.shows_text for each in wanted) and not problem.may_be_first[device]:
            return None
        makers = [(each, lying[each.made_at]) for each in wanted]
        sent += [((maker, device), float(each.send_s[maker, device])) for each, maker in makers if maker != device]
    return sent


def best_along(problem: Problem, order: tuple[int, ...], objective: str) -> float:
    """Give the least value along an order without rings, span by span; ``inf`` if there is no placement."""
    num_layers, merge = problem.num_layers, max if objective == "throughput" else sum
    links = problem.busy_s if objective == "throughput" else problem.hop_s
    ways = (
        (problem.enter_busy_s, problem.leave_busy_s)
        if objective == "throughput"
        else (problem.enter_s, problem.leave_s)
    )
    done: dict[tuple[int, int], float] = {}
    answer = math.inf
    for place, device in enumerate(order):
        started = [math.inf] * (num_layers + 1)
        if problem.may_be_first[device] and problem.enter_s[device] < math.inf:
            started[0] = ways[0][device]
        for layer in range(1, num_layers):
            for other in order[:place]:
                if problem.hop_s[other, device] < math.inf and (other, layer) in done:
                    started[layer] = min(started[layer], merge((done[other, layer], links[other, device])))
        for start, arrived in enumerate(started):
            if arrived == math.inf:
                continue
            seconds = problem.stage_s[device] + (problem.first_s[device] if start == 0 else 0)
            held = problem.stage_bytes[device] + (problem.first_bytes if start == 0 else 0)
            for end in range(start + 1, num_layers + 1):
                seconds += problem.layer_s[device, end - 1]
                held += problem.layer_bytes[end - 1]
                if held > problem.capacity_bytes[device]:
                    break
                if end < num_layers:
                    value = merge((arrived, seconds))
                    done[device, end] = min(done.get((device, end), math.inf), value)
                    continue
                held += problem.last_bytes - (problem.tied_bytes if start == 0 else 0)
                fits = held <= problem.capacity_bytes[device]
                if fits and problem.may_be_last[device] and problem.leave_s[device] < math.inf:
                    answer = min(answer, merge((arrived, seconds + problem.last_s[device], ways[1][device])))
    return float(answer)

"""The placement problem in numbers, and what a solver answers.

Knows arrays of seconds and bytes; not where they come from, and no devices beyond their names.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lingualinked.planning.placement.shortcuts import Shortcuts, sendings

Floats: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """One placement problem: D devices, L layers, and the caller, who sends token ids and takes logits.

    Every time is that of one *mean step* of the workload: a request's total divided by the tokens it generates.

    Parameters
    ----------
    names : tuple of str
        Of the devices.
    layer_s : ndarray
        float64 ``[D, L]``, seconds of compute of each layer on each device.
    stage_s : ndarray
        float64 ``[D]``, seconds that a stage costs whatever its layers.
    first_s, last_s : ndarray
        float64 ``[D]``, seconds that the first stage and the last stage cost besides.
    hop_s : ndarray
        float64 ``[D, D]``, seconds from the end of a stage on one device to the start of the next on another (latency
        and transfer); ``inf`` where there is no way.
    busy_s : ndarray
        float64 ``[D, D]``, the part of `hop_s` in which the link can carry nothing else (transfer).
    enter_s, enter_busy_s, leave_s, leave_busy_s : ndarray
        float64 ``[D]``, the same from the caller to a device, and from a device to the caller.
    layer_bytes : ndarray
        float64 ``[L]``, weights and KV of each layer.
    stage_bytes : ndarray
        float64 ``[D]``, working memory of a stage.
    first_bytes, last_bytes, tied_bytes : float
        Weights of the prologue and of the epilogue, and what a device that holds both holds once.
    capacity_bytes : ndarray
        float64 ``[D]``, memory of each device, less its reserve; ``inf`` where there is no limit.
    may_be_first, may_be_last : ndarray
        bool ``[D]``, whether a device may see token ids; whether it may see logits.
    may_close : ndarray
        bool ``[D]``, whether a device may hold the first and the last stage both, with others between them.
    watts : ndarray
        float64 ``[D]``, power while computing; NaN where it is not known.
    num_sessions : float
        Sessions in flight at the same time; ``inf``: as many as fill the pipeline.
    num_front, num_back : int
        Layers at the beginning that only devices may hold that may be first, and at the end those that may be last.
    forbidden_cuts : tuple of int
        Layers that must lie in the same span as the layer before them.
    shortcuts : Shortcuts or None
        Tensors that skip stages.
    """

    names: tuple[str, ...]
    layer_s: Floats
    stage_s: Floats
    first_s: Floats
    last_s: Floats
    hop_s: Floats
    busy_s: Floats
    enter_s: Floats
    enter_busy_s: Floats
    leave_s: Floats
    leave_busy_s: Floats
    layer_bytes: Floats
    stage_bytes: Floats
    first_bytes: float
    last_bytes: float
    tied_bytes: float
    capacity_bytes: Floats
    may_be_first: Flags
    may_be_last: Flags
    may_close: Flags
    watts: Floats
    num_sessions: float = math.inf
    num_front: int = 1
    num_back: int = 1
    forbidden_cuts: tuple[int, ...] = ()
    shortcuts: Shortcuts | None = None

    @property
    def num_devices(self) -> int:
        """D."""
        return len(self.names)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.layer_bytes.shape[0])


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Layers ``[start, end)`` on the device of that index."""

    device: int
    start: int
    end: int


Placement: TypeAlias = tuple[Span, ...]
"""Spans in pipeline order. A device occurs once, or as the first and the last of at least three."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a solver found.

    Parameters
    ----------
    placement : tuple of Span
        In pipeline order.
    value : float
        Of the objective: seconds between steps (throughput), seconds of a step (latency), joules of a step (energy).
    lower_bound : float
        No placement has a smaller value; proven.
    """

    placement: Placement
    value: float
    lower_bound: float


def bottleneck_s(problem: Problem, placement: Placement) -> float:
    """Give the seconds of a mean step that the busiest device or link needs: the inverse of a full pipeline's rate."""
    busy = np.zeros(problem.num_devices)
    for span in placement:
        busy[span.device] += span_s(problem, span)
    links: defaultdict[tuple[int, int], float] = defaultdict(float)
    for a, b in itertools.pairwise(placement):
        links[a.device, b.device] += problem.busy_s[a.device, b.device]
    for maker, user, seconds in shortcuts_s(problem, placement):
        links[maker, user] += seconds
    ends = problem.enter_busy_s[placement[0].device], problem.leave_busy_s[placement[-1].device]
    return float(max(busy.max(), *ends, *links.values()))


def latency_s(problem: Problem, placement: Placement) -> float:
    """Give the seconds of a mean step from the caller through all stages and back."""
    hops = sum(problem.hop_s[a.device, b.device] for a, b in itertools.pairwise(placement))
    ends = problem.enter_s[placement[0].device] + problem.leave_s[placement[-1].device]
    sent_s = sum(seconds for _, _, seconds in shortcuts_s(problem, placement))
    return float(sum(span_s(problem, span) for span in placement) + hops + ends + sent_s)


def interval_s(problem: Problem, placement: Placement) -> float:
    """Return the seconds between two mean steps with the problem's sessions in flight: the inverse of their rate."""
    return max(bottleneck_s(problem, placement), latency_s(problem, placement) / problem.num_sessions)


def energy_j(problem: Problem, placement: Placement) -> float:
    """Give the joules of a mean step: each device's power for as long as it computes."""
    return float(sum(problem.watts[span.device] * span_s(problem, span) for span in placement))


def span_s(problem: Problem, span: Span) -> float:
    """Give the seconds of compute of one stage."""
    seconds = problem.stage_s[span.device] + problem.layer_s[span.device, span.start : span.end].sum()
    if span.start == 0:
        seconds += problem.first_s[span.device]
    if span.end == problem.num_layers:
        seconds += problem.last_s[span.device]
    return float(seconds)


def shortcuts_s(problem: Problem, placement: Placement) -> list[tuple[int, int, float]]:
    """List what skips stages: from which device to which, and for how many seconds of a mean step."""
    spans = [(span.device, span.start, span.end) for span in placement]
    return [] if problem.shortcuts is None else list(sendings(problem.shortcuts, spans))


def device_bytes(problem: Problem, placement: Placement, device: int) -> float:
    """Give the bytes that a device holds."""
    spans = [span for span in placement if span.device == device]
    has_first = any(span.start == 0 for span in spans)
    has_last = any(span.end == problem.num_layers for span in spans)
    num_bytes = sum(problem.layer_bytes[span.start : span.end].sum() + problem.stage_bytes[device] for span in spans)
    num_bytes += problem.first_bytes * has_first + problem.last_bytes * has_last
    return float(num_bytes - problem.tied_bytes * (has_first and has_last))

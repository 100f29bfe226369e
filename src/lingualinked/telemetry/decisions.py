"""What was decided about a pipeline and what was done: every decision with its numbers, every migration with its times.

Plain records; knows neither who decides nor how layers are moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from lingualinked.quantities import seconds_text
from lingualinked.shown import Shown

Span = tuple[str, int, int]
"""Device name, start and end of one stage."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Layers that change their device.

    Parameters
    ----------
    start, end : int
        Half-open layer range.
    source, target : str
        Names of the devices.
    """

    start: int
    end: int
    source: str
    target: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Shown):
    """What the balancer decided at one moment, and why.

    Parameters
    ----------
    time_s : float
        When, on the caller's monotonic clock.
    action : {"move", "stay"}
        What it decided.
    trigger : str
        What made it decide, e.g. ``"device 'phone' is 4.1 times slower than before"``.
    reason : str
        Why it decided so, in plain words with the numbers.
    spans_before : tuple of (str, int, int)
        The stages as they are.
    spans_after : tuple of (str, int, int)
        The best stages that it knows; the same if there are none better.
    before_s, after_s : float
        Seconds of a mean step under the plan's objective, predicted from live speeds, as it is and after.
    gain_s, cost_s : float
        Seconds that moving would save over the horizon, and seconds that it would cost.
    horizon_s : float
        For how long present speeds are expected to last.
    moved_bytes : int
        Weights and KV that would have to be moved.
    slowdowns : mapping of str to float
        How many times slower than in the profile each device is now.
    dry_run : bool
        Whether it was only asked what would be done.
    migrations : tuple of Migration
        What was done about it, a migration per plan on the way; empty until it is done, and where nothing is.
    """

    time_s: float
    action: Literal["move", "stay"]
    trigger: str
    reason: str
    spans_before: tuple[Span, ...]
    spans_after: tuple[Span, ...]
    before_s: float
    after_s: float
    gain_s: float
    cost_s: float
    horizon_s: float
    moved_bytes: int
    slowdowns: Mapping[str, float]
    dry_run: bool = False
    migrations: tuple[Migration, ...] = ()

    @property
    def migration(self) -> Migration | None:
        """The last of its migrations; ``None`` if there is none."""
        return self.migrations[-1] if self.migrations else None

    @property
    def moves(self) -> tuple[Move, ...]:
        """Layers that would change their device."""
        return moves_between(self.spans_before, self.spans_after)

    def __str__(self) -> str:
        action = f"move {moves_text(self.moves)}" if self.action == "move" else self.action
        return f"{'would ' if self.dry_run else ''}{action}: {self.reason} ({self.trigger})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Migration(Shown):
    """Layers moved while the pipeline ran, or an attempt at it.

    Parameters
    ----------
    time_s : float
        When it began, on the caller's monotonic clock.
    plan_version : int
        Epoch of the plan that it led to.
    spans_before, spans_after : tuple of (str, int, int)
        The stages before and after.
    weight_bytes, kv_bytes : int
        Weights loaded, and KV sent, for it.
    load_s, copy_s, switch_s : float
        Seconds of loading weights in the background, of copying KV ahead, and until the last session had switched.
    longest_stall_s : float
        The longest that one session waited, between two of its steps, for its switch.
    num_sessions : int
        Sessions that were moved along.
    error : str
        Why it was rolled back; empty if it succeeded.
    """

    time_s: float
    plan_version: int
    spans_before: tuple[Span, ...]
    spans_after: tuple[Span, ...]
    weight_bytes: int
    kv_bytes: int
    load_s: float
    copy_s: float
    switch_s: float
    longest_stall_s: float
    num_sessions: int
    error: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the new plan is in force."""
        return not self.error

    @property
    def moves(self) -> tuple[Move, ...]:
        """Layers that changed their device, or were to."""
        return moves_between(self.spans_before, self.spans_after)

    def __str__(self) -> str:
        moves = moves_text(self.moves)
        if not self.succeeded:
            return f"could not move {moves}: {self.error}"
        took = seconds_text(self.load_s + self.copy_s + self.switch_s)
        return f"moved {moves} in {took}; longest stall {seconds_text(self.longest_stall_s)}"


def unmeasured(time_s: float, before: tuple[Span, ...], after: tuple[Span, ...]) -> Decision:
    """Return the decision for a plan that was given where nothing is measured: all its figures are 0."""
    return Decision(
        time_s=time_s,
        action="stay" if before == after else "move",
        trigger="rebalance was called with a plan",
        reason="the plan was given",
        spans_before=before,
        spans_after=after,
        before_s=0.0,
        after_s=0.0,
        gain_s=0.0,
        cost_s=0.0,
        horizon_s=0.0,
        moved_bytes=0,
        slowdowns={},
    )


def moves_between(before: Iterable[Span], after: Iterable[Span]) -> tuple[Move, ...]:
    """Return the layers that are on another device after than before, as ranges with one source and one target each."""
    old = [device for device, start, end in before for _ in range(start, end)]
    new = [device for device, start, end in after for _ in range(start, end)]
    moves: list[Move] = []
    for layer, (source, target) in enumerate(zip(old, new, strict=True)):
        if source == target:
            continue
        last = moves[-1] if moves else None
        if last is not None and (last.end, last.source, last.target) == (layer, source, target):
            moves[-1] = dataclasses.replace(last, end=layer + 1)
        else:
            moves.append(Move(start=layer, end=layer + 1, source=source, target=target))
    return tuple(moves)


def moves_text(moves: Iterable[Move]) -> str:
    """Write what changes its device: ``"[3, 6) phone → laptop"``."""
    return ", ".join(f"[{move.start}, {move.end}) {move.source} → {move.target}" for move in moves) or "nothing"

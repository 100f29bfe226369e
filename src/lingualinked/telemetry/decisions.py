"""Records of the balancer's decisions, with their numbers, and of migrations, with their times.

Plain data; does not decide or move anything.
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
    """A range of layers that moves from one device to another.

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
    """A decision of the balancer to move layers or to stay, and the reason.

    Parameters
    ----------
    time_s : float
        Time of the decision, on the caller's monotonic clock.
    action : {"move", "stay"}
        The decision.
    trigger : str
        What caused the decision, e.g. ``"device 'phone' takes 4.10 times as long as before"``.
    reason : str
        Why, in words, with the numbers.
    spans_before : tuple of (str, int, int)
        The present stages.
    spans_after : tuple of (str, int, int)
        The best stages found; equal to `spans_before` if none are better.
    before_s, after_s : float
        Predicted seconds of a mean step under the plan's objective, at present speeds, before and after the move.
    gain_s, cost_s : float
        Seconds that the move would save within the horizon, and seconds that it would cost.
    horizon_s : float
        Seconds for which present speeds are expected to last.
    moved_bytes : int
        Bytes of weights and KV to move.
    slowdowns : mapping of str to float
        Present slowdown of each device relative to its profile.
    dry_run : bool
        Whether the user only asked what would be done.
    migrations : tuple of Migration
        The migrations that carried it out, one per intermediate plan; empty before that, and if nothing moves.
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
        """The last migration; ``None`` if there is none."""
        return self.migrations[-1] if self.migrations else None

    @property
    def moves(self) -> tuple[Move, ...]:
        """The layers to move."""
        return moves_between(self.spans_before, self.spans_after)

    def __str__(self) -> str:
        action = f"move {moves_text(self.moves)}" if self.action == "move" else self.action
        return f"{'would ' if self.dry_run else ''}{action}: {self.reason} ({self.trigger})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Migration(Shown):
    """A completed or failed move of layers while the pipeline runs.

    Parameters
    ----------
    time_s : float
        Start, on the caller's monotonic clock.
    plan_version : int
        Version of the new plan.
    spans_before, spans_after : tuple of (str, int, int)
        The stages before and after.
    weight_bytes, kv_bytes : int
        Bytes of weights loaded, and of KV sent.
    load_s, copy_s, switch_s : float
        Seconds of loading weights in the background; of copying KV ahead; until the last session had switched.
    longest_stall_s : float
        The longest wait of one session for its switch, between two of its steps.
    num_sessions : int
        Sessions that were moved.
    error : str
        Why the migration was rolled back; empty if it succeeded.
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
    def total_s(self) -> float:
        """Seconds from the start until the last session had switched."""
        return self.load_s + self.copy_s + self.switch_s

    @property
    def end_s(self) -> float:
        """End, on the clock of `time_s`."""
        return self.time_s + self.total_s

    @property
    def succeeded(self) -> bool:
        """Whether the new plan is in force."""
        return not self.error

    @property
    def moves(self) -> tuple[Move, ...]:
        """The layers that moved, or were to move."""
        return moves_between(self.spans_before, self.spans_after)

    def __str__(self) -> str:
        moves = moves_text(self.moves)
        if not self.succeeded:
            return f"could not move {moves}: {self.error}"
        return f"moved {moves} in {seconds_text(self.total_s)}; longest stall {seconds_text(self.longest_stall_s)}"


def moves_between(before: Iterable[Span], after: Iterable[Span]) -> tuple[Move, ...]:
    """Return the ranges of layers whose device differs, each with one source and one target."""
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
    """Format moves: ``"[3, 6) phone → laptop"``."""
    return ", ".join(f"[{move.start}, {move.end}) {move.source} → {move.target}" for move in moves) or "nothing"

"""A pipeline as a line of servers that every step visits in order: how long each is busy, and the way to the next.

Knows names and seconds; not where they come from, and not what a stage or a link is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

from lingualinked.checks import is_real
from lingualinked.errors import ArgumentError
from lingualinked.planning.prefill_prediction import pass_chunks

StepKind: TypeAlias = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One halt of a step on its way: a device that computes a stage, or a link that carries one message at a time.

    Raises ArgumentError for a time that is negative or not finite.
    """

    server: int  # index of the server that is busy meanwhile
    prefill_s: float
    decode_s: float
    chunks_s: tuple[float, ...] = ()  # of each chunk of a prefill that is cut; prefill_s is their sum
    delay_s: float = 0.0  # travelling, which keeps nobody busy: the latency of a link

    def __post_init__(self) -> None:
        for name in ("prefill_s", "decode_s", "delay_s"):
            value = getattr(self, name)
            if not is_real(value) or not 0 <= float(value) < math.inf:
                raise ArgumentError(f"{name}={value!r} of a visit must be a finite number of seconds, at least 0")
        if self.chunks_s and not (min(self.chunks_s) >= 0 and math.isclose(sum(self.chunks_s), self.prefill_s)):
            raise ArgumentError(
                f"chunks_s={self.chunks_s!r} of a visit must be seconds that add up to {self.prefill_s=}"
            )

    @property
    def prefill_steps_s(self) -> tuple[float, ...]:
        """Seconds of each step of a prefill: of its chunks, or of the whole."""
        return self.chunks_s or (self.prefill_s,)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimes:
    """The way of a step from the caller through all stages and back, in seconds.

    A server may be visited several times: a device that holds the first and the last stage both is visited twice.

    Examples
    --------
    >>> line = PipelineTimes(
    ...     servers=("a", "a -> b", "b"),
    ...     visits=(
    ...         Visit(server=0, prefill_s=0.2, decode_s=0.010),
    ...         Visit(server=1, prefill_s=0.1, decode_s=0.001, delay_s=0.003),
    ...         Visit(server=2, prefill_s=0.3, decode_s=0.015),
    ...     ),
    ... )
    >>> round(line.step_s("decode"), 6)
    0.029
    """

    servers: tuple[str, ...]  # names of the devices and links, all different
    visits: tuple[Visit, ...]

    def busy_s(self, num_decodes: int) -> dict[str, float]:
        """Return the seconds for which a request of so many decode steps keeps each server busy, by its name."""
        busy_s = dict.fromkeys(self.servers, 0.0)
        for visit in self.visits:
            busy_s[self.servers[visit.server]] += visit.prefill_s + num_decodes * visit.decode_s
        return busy_s

    def step_s(self, kind: StepKind) -> float:
        """Return the seconds of a step, or of all chunks of a prefill, with nothing else in flight, from the caller back to it."""
        if kind == "prefill":
            return pass_chunks((visit.prefill_steps_s, visit.delay_s) for visit in self.visits)
        busy = (visit.decode_s for visit in self.visits)
        return math.fsum(busy) + math.fsum(visit.delay_s for visit in self.visits)

"""A pipeline as a line of servers that every step visits in order: how long each is busy, and the way to the next.

Knows names and seconds; not where they come from, and not what a stage or a link is.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Literal, TypeAlias

from lingualinked.checks import as_integer, is_real
from lingualinked.errors import ArgumentError

StepKind: TypeAlias = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One halt of a step on its way: a device that computes a stage, or a link that carries one message at a time.

    Parameters
    ----------
    server : int
        Index of the server that is busy meanwhile.
    prefill_s, decode_s : float
        Seconds for which a prefill step and a decode step keep it busy.
    delay_s : float
        Seconds that the step then travels and keeps nobody busy: the latency of a link.

    Raises
    ------
    ArgumentError
        If the index is no integer from 0 on, or a time is negative or not finite; the message names the field.
    """

    server: int
    prefill_s: float
    decode_s: float
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if as_integer(self.server, at_least=0) is None:
            raise ArgumentError(f"server={self.server!r} of a visit must be the index of a server, from 0 on")
        for name in ("prefill_s", "decode_s", "delay_s"):
            value = getattr(self, name)
            if not is_real(value) or not 0 <= float(value) < math.inf:
                raise ArgumentError(f"{name}={value!r} of a visit must be a finite number of seconds, at least 0")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimes:
    """The way of a step from the caller through all stages and back, in seconds.

    Parameters
    ----------
    servers : tuple of str
        Names of the devices and links; each serves one step at a time, in the order in which they reach it.
    visits : tuple of Visit
        What a step visits, in order. A server may occur several times: a device that holds the first and the last
        stage both occurs twice.

    Raises
    ------
    ArgumentError
        If there is no visit, a name occurs twice, or a visit's server is not among `servers`.

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

    servers: tuple[str, ...]
    visits: tuple[Visit, ...]

    def __post_init__(self) -> None:
        if not self.visits:
            raise ArgumentError("visits is empty: a step visits at least one server")
        twice = [name for name, count in collections.Counter(self.servers).items() if count > 1]
        if twice:
            raise ArgumentError(f"servers has {twice} more than once: each server needs a name of its own")
        for position, visit in enumerate(self.visits):
            if visit.server >= len(self.servers):
                raise ArgumentError(
                    f"server={visit.server} of visits[{position}] is unknown: the servers are 0 to {len(self.servers) - 1}"
                )

    def busy_s(self, num_decodes: int) -> dict[str, float]:
        """Return the seconds for which a request of so many decode steps keeps each server busy, by its name."""
        busy_s = dict.fromkeys(self.servers, 0.0)
        for visit in self.visits:
            busy_s[self.servers[visit.server]] += visit.prefill_s + num_decodes * visit.decode_s
        return busy_s

    def step_s(self, kind: StepKind) -> float:
        """Return the seconds of a step that waits nowhere, from the caller back to the caller."""
        busy = (visit.prefill_s if kind == "prefill" else visit.decode_s for visit in self.visits)
        return math.fsum(busy) + math.fsum(visit.delay_s for visit in self.visits)

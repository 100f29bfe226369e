"""Which plan a model's sessions run under, and the one that they are to change to.

Knows plans and their versions; neither messages nor sessions.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable

from lingualinked import environment, rounding
from lingualinked.device import CALLER
from lingualinked.environment import Environments
from lingualinked.errors import LingualinkedError
from lingualinked.planning.plan import Plan
from lingualinked.rounding import Invariance, Rounding, independent_rows


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A plan whose stages workers host, and the version under which they know it: no two have the same."""

    version: int
    plan: Plan
    independent_rows: int = 0  # as in `Rounding`, of all its workers

    def with_rounding(self, loaded: Iterable[Rounding], environments: Environments) -> Route:
        """Return the same route with what its workers, stage by stage, say of how they round and what they compute with."""
        roundings = dict(zip(self.stage_devices, loaded, strict=True))
        own = {name: each for name, each in environments.items() if name in (CALLER, *roundings)}
        because = (
            self.plan.inexact_because
            or environment.describe_difference(own)
            or rounding.describe_difference(roundings, {name: each.processor for name, each in own.items()})
        )
        plan = dataclasses.replace(self.plan, inexact_because=because)
        return Route(self.version, plan, independent_rows(roundings.values()))

    @property
    def stage_devices(self) -> tuple[str, ...]:
        """The device of each stage, in pipeline order; a device may occur twice."""
        return tuple(stage.device for stage in self.plan.stages)


class Routes:
    """The route in force and the one that sessions switch to; used by many threads.

    The only place where the plan in force is kept: the migrator sets it, and each event tells it to the balancer.
    """

    def __init__(self, first: Route) -> None:
        self.current = first
        self.target = first
        self.error: LingualinkedError | None = None  # why the last target was rejected, if it was
        self.invariances: dict[str, Invariance] = {}  # of all devices that have had stages of a batch-invariant model
        self._lock = threading.RLock()  # a finalizer may come here in the middle of anything

    def begin(self, loaded: Route) -> None:
        """Put the first route in force as its workers have loaded it."""
        self.current = self.target = loaded

    def begin_switch(self, target: Route) -> None:
        """Make sessions switch to another route, each between two of its steps."""
        with self._lock:
            self.target, self.error = target, None

    def reject_target(self, target: Route, error: LingualinkedError) -> bool:
        """Make sessions switch back, since one of them could not switch; return whether there is a way back."""
        with self._lock:
            if self.target is target and target is not self.current:
                self.target, self.error = self.current, error
            return target is not self.current

    def pop_error(self) -> LingualinkedError:
        """Return why the last target was rejected, which is then no longer kept (`pending.result_of`)."""
        error, self.error = self.error, None
        assert error is not None, "no target was rejected"
        return error

    def adopt_target(self) -> None:
        """Put the target route in force, once all sessions have switched to it."""
        with self._lock:
            self.current = self.target

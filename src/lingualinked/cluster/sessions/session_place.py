"""Where a session runs, apart from the session itself, so that a finalizer can end it there.

Knows routes and messages; no steps.
"""

from __future__ import annotations

import dataclasses

from lingualinked.cluster.kv.kv_budget import KVBudget
from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.plans.route import Route
from lingualinked.interrupts import uninterrupted
from lingualinked.protocol.steps import EndSession


@dataclasses.dataclass(slots=True)
class SessionPlace:
    """The route on which a session runs."""

    route: Route


@uninterrupted
def end_session(engine: Engine, model: int, number: int, place: SessionPlace, budget: KVBudget) -> None:
    """Free a session's KV in every stage, and give back its share of the budget."""
    route = place.route
    message = EndSession(model=model, plan_version=route.version, stage=0, session=number)
    engine.end_session(route.stage_devices, message)
    budget.release(number)  # not before: what then takes its room goes behind it, and workers count too

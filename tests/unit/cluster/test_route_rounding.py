"""A route says when its workers round differently, and from how many rows on rows are independent."""

from __future__ import annotations

import msgspec

from lingualinked.cluster.plans.route import Route
from lingualinked.device import CALLER
from lingualinked.model.process.environment_probe import read_environment
from lingualinked.planning.plan import Plan
from lingualinked.rounding import Rounding


def test_workers_that_round_differently_make_a_plan_inexact() -> None:
    route = Route(1, Plan.from_spans([("a", 0, 2), ("b", 2, 5)]))
    same = route.with_rounding([Rounding("x", 2), Rounding("x", 2)], {})
    assert same.plan == route.plan
    assert same.independent_rows == 2
    other = route.with_rounding([Rounding("x", 2), Rounding("y", 0)], {})
    assert not other.plan.exact
    assert other.plan.inexact_because == "'a' and 'b' sum in different orders"
    assert other.independent_rows == 0


def test_workers_that_compute_with_other_versions_make_a_plan_inexact() -> None:
    route = Route(1, Plan.from_spans([("a", 0, 2), ("b", 2, 5)]))
    here = read_environment()
    there = msgspec.structs.replace(here, versions=here.versions._replace(transformers="1.0"))
    roundings = [Rounding("x", 2), Rounding("x", 2)]
    assert route.with_rounding(roundings, {CALLER: here, "a": here, "b": here, "unused": there}).plan.exact
    because = route.with_rounding(roundings, {CALLER: here, "a": here, "b": there}).plan.inexact_because
    assert "transformers" in because
    assert "1.0 on 'b'" in because

"""A route says when its workers round differently, and from how many rows on rows are independent."""

from __future__ import annotations

from lingualinked.cluster.route import Route
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

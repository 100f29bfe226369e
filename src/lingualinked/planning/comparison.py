"""Plans held against each other by what they are predicted to do.

Knows plans and predictions; how a table is drawn is display's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lingualinked.errors import ArgumentError
from lingualinked.planning.plan import Plan
from lingualinked.planning.prediction import Prediction, predict
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.pretty import pretty_text
from lingualinked.quantities import count_text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Predictions of several plans under one workload; shows itself as a table.

    Parameters
    ----------
    names : tuple of str
        Of the plans.
    predictions : tuple of Prediction
        In the same order; the first one is what the others are held against.
    """

    names: tuple[str, ...]
    predictions: tuple[Prediction, ...]

    def ratios(self, figure: str) -> tuple[float, ...]:
        """Divide every plan's figure by the first plan's.

        Parameters
        ----------
        figure : str
            An attribute of `Prediction` that is a number, e.g. ``"pipeline_tokens_per_s"``.
        """
        values: list[Any] = [getattr(prediction, figure, None) for prediction in self.predictions]
        if not all(isinstance(value, int | float) for value in values):
            raise ArgumentError(f"figure={figure!r} is not a number of a Prediction")
        return tuple(value / values[0] for value in values)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the predictions by name, as plain Python data."""
        return {name: each.to_dict() for name, each in zip(self.names, self.predictions, strict=True)}

    _repr_pretty_ = pretty_text

    def __str__(self) -> str:
        from lingualinked.display.plan import comparison_rows  # plain data that can be drawn

        return comparison_rows(self).to_text()

    def _repr_html_(self) -> str:
        from lingualinked.display.plan import comparison_rows

        return comparison_rows(self).to_html()


def compare_plans(plans: Sequence[Plan], names: Sequence[str]) -> Comparison:
    """Predict plans under the first one's workload.

    Raises
    ------
    ArgumentError
        If a plan is of another number of layers, the names are not as many as the plans, or the first has no profile.
    """
    for plan in plans:
        if not isinstance(plan, Plan):
            raise ArgumentError(
                f"a {type(plan).__name__} can't be compared with a plan: give lingualinked.Plan objects"
            )
    names = tuple(names) or tuple(f"plan {index}" for index in range(len(plans)))
    if len(names) != len(plans):
        raise ArgumentError(f"names={names} for {count_text(len(plans), 'plan')}: give one for each, this plan's first")
    first = plans[0]
    workload = first.measured.model.fit_workload(first.workload)
    predictions = []
    for plan in plans:
        profile = plan.profile or first.measured
        if plan.num_layers != first.num_layers:
            raise ArgumentError(
                f"a plan of {count_text(plan.num_layers, 'layer')} can't be compared with one of {first.num_layers}"
            )
        predictions.append(predict(plan.stages, WorkloadCosts(profile, workload, plan.reserve)))
    return Comparison(names=names, predictions=tuple(predictions))

"""Plans held against each other by what they are predicted to do.

Knows predictions; neither plans nor how a table is drawn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lingualinked.errors import ArgumentError
from lingualinked.planning.prediction import Prediction
from lingualinked.shown import Shown


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Shown):
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

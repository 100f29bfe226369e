"""Figures that notebooks show without pyplot, which would keep every figure in memory.

Knows matplotlib, an extra that is imported only to draw.
"""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

from lingualinked.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "borderaxespad": 0.2}
"""Style of legends."""
ABOVE_RIGHT: dict[str, Any] = {**LEGEND, "loc": "lower right", "bbox_to_anchor": (1, 1)}
"""Style of legends above the right corner."""


def new_figure(width_in: float, height_in: float) -> Figure:
    """Make an empty figure, of a size in inches, that a notebook shows if it is the last value of a cell."""
    return _figure_class()(figsize=(width_in, height_in), layout="constrained")


@functools.cache
def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("plot() needs matplotlib: pip install 'lingualinked[plot]'") from error

    class NotebookFigure(Figure):
        """A figure that notebooks show as PNG."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    return NotebookFigure

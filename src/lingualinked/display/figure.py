"""Figures that notebooks show without pyplot, which would keep every figure in memory.

Knows matplotlib, an extra that is imported only to draw.
"""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

from lingualinked.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

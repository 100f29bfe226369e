"""A figure that a notebook shows without pyplot, whose registry would keep every figure ever drawn.

Knows matplotlib, an extra: imported only by what draws pictures.
"""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A matplotlib figure that draws itself where it is the last value of a cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()

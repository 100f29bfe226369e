"""Whether rows are computed together that have to have the bits which each has alone.

torch sums a product of one row in another order than one of several. Knows no kernel: those that compute each row by itself ask here
how many rows their result has to be equal to.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_are_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("rows alone", default=False)


@contextlib.contextmanager
def rows_alone() -> Iterator[None]:
    """Compute each row as if it were the only one, within the context, in the layers that can."""
    token = _are_alone.set(True)
    try:
        yield
    finally:
        _are_alone.reset(token)


def count_rows(num_rows: int) -> int:
    """Return the number of rows whose bits the result of so many has to have."""
    return 1 if _are_alone.get() else num_rows

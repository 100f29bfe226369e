"""The end of a cluster: what it consists of is closed in order, by the process that made it.

Knows neither what that is nor why a cluster ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Protocol

from lingualinked.interrupts import uninterrupted
from lingualinked.own_threads import close_from_here


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Close it."""


def close_all(those: Iterable[Closable]) -> None:
    """Close all of them, where closing one removes it from among them."""
    for each in list(those):
        each.close()


@uninterrupted
def shut_down(ends: contextlib.ExitStack, owner_pid: int) -> None:
    """Close what a cluster consists of, unless this is a forked child: the workers are the parent's."""
    if os.getpid() == owner_pid:
        close_from_here(ends.close)

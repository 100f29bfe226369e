"""Waiting for what must come about: bounded, and by looking, where nothing tells.

Knows nothing of what is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Return once ``holds()`` is true; fail the test if it does not become so in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "what was waited for has not come about"
        time.sleep(0.01)


def num_sessions(model: Any) -> list[int]:
    """Sessions that hold KV in each stage of a sharded model; the end of one travels from stage to stage."""
    return [stage.num_sessions for stage in model.telemetry.stages]

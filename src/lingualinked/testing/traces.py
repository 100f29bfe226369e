"""Writes a timeline of each test's sharded models.

Knows tests and histories; not how a trace is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from lingualinked.sharded.model import ShardedModel
from lingualinked.telemetry.history import History
from lingualinked.telemetry.perfetto import write_trace

_LONGEST_NAME = 150


class TraceWriter:
    """Hooks of pytest, for ``--lingualinked-trace``."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).absolute()  # before a test changes the current folder
        self._folder.mkdir(parents=True, exist_ok=True)

    def pytest_report_header(self) -> str:
        """Say where the traces are."""
        return f"lingualinked: traces in {self._folder}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Run a test, and write what its models did meanwhile, also if it fails."""
        began_s = time.monotonic()
        try:
            return (yield)
        finally:
            values = getattr(item, "funcargs", {}).items()
            models = {name: value for name, value in values if isinstance(value, ShardedModel)}
            for name, model in models.items():
                label = item.nodeid if len(models) == 1 else f"{item.nodeid}-{name}"
                write_trace(_since(model._pipeline.history, began_s), self._folder / file_name(label))  # noqa: SLF001 - without a question to workers that may be dead


def file_name(test: str) -> str:
    """Return the name of a test's trace: as much of its id as a file name may hold."""
    name = re.sub(r"[^\w.=+-]+", "_", test)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"
    return f"{name}.json"


def _since(history: History, start_s: float) -> History:
    """Leave out what ended before a test began: the model may be older."""
    return dataclasses.replace(
        history,
        start_s=start_s,
        steps=tuple(each for each in history.steps if each.end_s >= start_s),
        devices=tuple(each for each in history.devices if each.time_s >= start_s),
        decisions=tuple(each for each in history.decisions if each.time_s >= start_s),
        migrations=tuple(each for each in history.migrations if each.end_s >= start_s),
    )

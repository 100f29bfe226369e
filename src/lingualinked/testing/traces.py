"""Writes a timeline of each test's sharded models.

Knows tests and histories; not how a trace is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
import weakref
from collections.abc import Generator
from pathlib import Path

import pytest

from lingualinked.cluster.cluster import Cluster
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
        """Run a test, and write what models did meanwhile on the clusters among its fixtures, also if it fails."""
        values = getattr(item, "funcargs", {}).values()
        clusters = {value for value in values if isinstance(value, Cluster)}
        clusters |= {value.cluster for value in values if isinstance(value, ShardedModel)}
        for cluster in clusters:
            cluster._recorders = set(cluster._recorders)  # noqa: SLF001 - keeps those of models that the test drops
        began_s = time.monotonic()
        try:
            return (yield)
        finally:
            histories = [
                _since(recorder.history(), began_s)
                for cluster in clusters
                for recorder in cluster._recorders  # noqa: SLF001 - no question to workers that may be dead
            ]
            for cluster in clusters:
                cluster._recorders = weakref.WeakSet(cluster._recorders)  # noqa: SLF001 - as it was
            self._write(item.nodeid, [each for each in histories if each.steps or each.decisions or each.migrations])

    def _write(self, test: str, histories: list[History]) -> None:
        for number, history in enumerate(sorted(histories, key=lambda each: each.end_s), start=1):
            write_trace(history, self._folder / file_name(test if len(histories) == 1 else f"{test}-{number}"))


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

"""Carries a worker's log records and warnings to the caller.

Knows logging and a function that sends; records wait until the worker's own thread sends them.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable

_MAX_RECORDS = 1000


class ForwardingHandler(logging.Handler):
    """Keeps the latest records until `drain` returns them; calls `on_record` for each, on any thread."""

    def __init__(self) -> None:
        super().__init__()
        self.on_record: Callable[[], None] = lambda: None
        self._records: collections.deque[tuple[int, str, str]] = collections.deque(maxlen=_MAX_RECORDS)

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        try:
            self._records.append((record.levelno, record.name, self.format(record)))
            self.on_record()
        except Exception:  # noqa: BLE001 - as in every handler: logging must not raise
            self.handleError(record)

    def drain(self) -> list[tuple[int, str, str]]:
        """Remove the records that wait, and return them as (level, logger name, text)."""
        records = []
        while self._records:
            records.append(self._records.popleft())
        return records


def forward_logs(level: int) -> ForwardingHandler:
    """Route every record of this process, and Python's warnings, to a new handler."""
    handler = ForwardingHandler()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for logger in root.manager.loggerDict.values():
        # torch and transformers write to standard error themselves, and do not propagate their records.
        if isinstance(logger, logging.Logger) and any(type(own) is logging.StreamHandler for own in logger.handlers):
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    return handler

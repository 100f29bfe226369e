"""Carries a worker's log records and warnings to the caller.

Knows logging and a function that sends; records wait until the worker's own thread sends them.
"""

from __future__ import annotations

import collections
import logging

_LIMIT = 1000


class ForwardingHandler(logging.Handler):
    """Keeps records until `drain` takes them; the oldest go when too many wait."""

    def __init__(self) -> None:
        super().__init__()
        self._records: collections.deque[tuple[int, str, str]] = collections.deque(maxlen=_LIMIT)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.levelno, record.name, self.format(record)))

    def drain(self) -> list[tuple[int, str, str]]:
        """Take the records that wait, as (level, logger name, text)."""
        records = []
        while self._records:
            records.append(self._records.popleft())
        return records


def forward_logs(level: int) -> ForwardingHandler:
    """Send every record of this process, and Python's warnings, through a new handler."""
    handler = ForwardingHandler()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    return handler

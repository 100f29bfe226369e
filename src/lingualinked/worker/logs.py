"""Carries a worker's log records and warnings to the caller.

Knows logging and a function that sends; records wait until the worker's own thread sends them.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable

_LIMIT = 1000


class ForwardingHandler(logging.Handler):
    """Keeps records until `drain` takes them; the oldest go when too many wait.

    Attributes
    ----------
    on_record : callable
        Called for every record, on any thread: the one that sends them may be waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_record: Callable[[], None] = lambda: None
        self._records: collections.deque[tuple[int, str, str]] = collections.deque(maxlen=_LIMIT)

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        try:
            self._records.append((record.levelno, record.name, self.format(record)))
            self.on_record()
        except Exception:  # noqa: BLE001 - as in every handler: who logs must not suffer
            self.handleError(record)

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
    for logger in root.manager.loggerDict.values():
        # torch and transformers write to standard error themselves, and keep their records from the root.
        if isinstance(logger, logging.Logger) and any(type(own) is logging.StreamHandler for own in logger.handlers):
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    return handler

"""Text that a worker sends, made fit to be shown: it can move no cursor, forge no line and flood no log.

Knows text and the time; neither messages' ways nor what they mean.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from lingualinked.environment import Environment
from lingualinked.protocol.daemon import HostFacts
from lingualinked.versions import Versions

if TYPE_CHECKING:  # it imports torch
    from lingualinked.protocol.messages import LogRecord


_LOGGERS = frozenset({"lingualinked.worker", "lingualinked.transport"})
_MAX_CHARACTERS = 20_000
_MAX_NAME = 200  # characters of a version, of a processor's name
_BURST, _PER_S = 1_000, 50.0  # records of one device


def readable(text: str) -> str:
    """Return a text with its control characters written out, all but ends of lines and tabs, and no longer than is read."""
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]} [... {len(text) - _MAX_CHARACTERS} more characters]"
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def readable_environment(environment: Environment) -> Environment:
    """Return what a worker says it computes with, as it can be shown."""
    texts = {name: value for name, value in msgspec.structs.asdict(environment).items() if isinstance(value, str)}
    return msgspec.structs.replace(
        environment,
        versions=Versions(*map(_in_one_line, environment.versions)),
        **{name: _in_one_line(value) for name, value in texts.items()},
    )


def readable_facts(facts: HostFacts) -> HostFacts:
    """Return what a daemon says of its host, as it can be shown."""
    texts = {name: value for name, value in msgspec.structs.asdict(facts).items() if isinstance(value, str)}
    return msgspec.structs.replace(
        facts,
        versions=Versions(*map(_in_one_line, facts.versions)),
        **{name: _in_one_line(value) for name, value in texts.items()},
    )


def _in_one_line(text: str) -> str:
    return readable(text[:_MAX_NAME]).replace("\n", " ")


class RemoteLog:
    """Writes one device's log records to loggers here."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._num_left = float(_BURST)
        self._num_dropped = 0
        self._seen_s = time.monotonic()

    def write(self, record: LogRecord) -> None:
        """Log a record, every line of it under the device's name; or count it, if there are too many."""
        now_s = time.monotonic()
        self._num_left = min(_BURST, self._num_left + (now_s - self._seen_s) * _PER_S)
        self._seen_s = now_s
        if self._num_left < (_PER_S if self._num_dropped else 1):  # so that there is one notice of many
            self._num_dropped += 1
            return
        self._num_left -= 1
        if self._num_dropped:
            self._log(
                logging.WARNING, "lingualinked.worker", f"{self._num_dropped} records were left out: too many at once"
            )
            self._num_dropped = 0
        self._log(record.level, record.logger, record.text)

    def _log(self, level: int, logger: str, text: str) -> None:
        name = logger if logger in _LOGGERS else "lingualinked.worker"
        lines = readable(text).replace("\n", f"\n[{self._device}] ")
        level = min(max(level, logging.DEBUG), logging.CRITICAL)
        logging.getLogger(name).log(level, "[%s] %s", self._device, lines, extra={"device": self._device})

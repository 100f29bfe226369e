"""What workers write can move no cursor, forge no line, make no logger and flood no log."""

from __future__ import annotations

import logging

import pytest

from lingualinked.cluster.messaging.failures import error_of
from lingualinked.cluster.workers.remote_text import RemoteLog, readable
from lingualinked.errors import WorkerError
from lingualinked.protocol.failures import FailureKind, StepFailed
from lingualinked.protocol.messages import LogRecord


def record(text: str, *, level: int = logging.WARNING, logger: str = "lingualinked.worker") -> LogRecord:
    return LogRecord(level=level, logger=logger, text=text)


def test_control_characters_are_written_out() -> None:
    assert readable("a\x1b[2Jb\r\x00\u202ec\nd\te\u00e9") == "a\\x1b[2Jb\\r\\x00\\u202ec\nd\te\u00e9"
    assert len(readable("x" * 10**6)) < 21_000


def test_every_line_stands_under_the_device(caplog: pytest.LogCaptureFixture) -> None:
    RemoteLog("a").write(record("hot\n[b] cold"))
    assert caplog.records[0].getMessage() == "[a] hot\n[a] [b] cold"


def test_names_of_loggers_are_ours(caplog: pytest.LogCaptureFixture) -> None:
    log, before = RemoteLog("a"), set(logging.root.manager.loggerDict)
    for number in range(500):
        log.write(record("text", logger=f"lingualinked.{number}.{number}"))
    log.write(record("text", logger="lingualinked.transport"))
    assert {each.name for each in caplog.records} == {"lingualinked.worker", "lingualinked.transport"}
    assert set(logging.root.manager.loggerDict) <= before | {"lingualinked.worker", "lingualinked.transport"}


def test_levels_are_levels(caplog: pytest.LogCaptureFixture) -> None:
    for level in (-5, 10**9):
        RemoteLog("a").write(record("text", level=level))
    assert caplog.records[-1].levelno == logging.CRITICAL


def test_a_flood_is_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    log = RemoteLog("a")
    for number in range(5_000):
        log.write(record(str(number)))
    assert len(caplog.records) == 1_000
    now = 1.0
    log.write(record("after"))
    assert [each.getMessage() for each in caplog.records[1_000:]] == [
        "[a] 4000 records were left out: too many at once",
        "[a] after",
    ]


def test_errors_are_readable_too() -> None:
    failed = StepFailed(model=1, session=1, number=0, kind=FailureKind.ERROR, cause="E: \x1b[31m", traceback="\x07")
    error = error_of("a", failed)
    assert isinstance(error, WorkerError)
    assert "\\x1b[31m" in str(error)
    assert "\x07" not in str(error)

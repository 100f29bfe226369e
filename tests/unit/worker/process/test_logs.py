"""All log records and warnings of a worker's process are kept for the caller."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from lingualinked.worker.process.logs import ForwardingHandler, forward_logs


@pytest.fixture
def forwarding() -> Iterator[ForwardingHandler]:
    """Redirect this process's logging, as a worker does, and restore it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    loggers = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    before = [(each, each.handlers[:], each.propagate) for each in loggers]
    yield forward_logs(logging.INFO)
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level
    for each, its_handlers, propagate in before:
        each.handlers[:], each.propagate = its_handlers, propagate


def test_records_are_kept_in_order(forwarding: ForwardingHandler) -> None:
    logging.getLogger("lingualinked.worker").warning("about %s", "a stage")
    logging.getLogger("anything.else").info("more")
    logging.getLogger("anything.else").debug("not asked for")
    assert forwarding.drain() == [
        (logging.WARNING, "lingualinked.worker", "about a stage"),
        (logging.INFO, "anything.else", "more"),
    ]
    assert forwarding.drain() == []


def test_warnings_are_records(forwarding: ForwardingHandler) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # the context manager has put Python's own function back
        warnings.warn("old ways", FutureWarning, stacklevel=1)
    ((level, name, text),) = forwarding.drain()
    assert (level, name) == (logging.WARNING, "py.warnings")
    assert "FutureWarning: old ways" in text


def test_loggers_that_write_to_standard_error_themselves_are_heard_too(forwarding: ForwardingHandler) -> None:
    logger = logging.getLogger("a.library.of.its.own")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.propagate = False
    handler = forward_logs(logging.INFO)
    logger.warning("heard")
    assert [text for _, _, text in handler.drain()] == ["heard"]


def test_who_sends_the_records_is_woken(forwarding: ForwardingHandler) -> None:
    woken: list[bool] = []
    forwarding.on_record = lambda: woken.append(True)
    logging.getLogger("lingualinked.worker").warning("now")
    assert woken == [True]


def test_the_oldest_go_when_too_many_wait(forwarding: ForwardingHandler) -> None:
    for number in range(1500):
        logging.getLogger("lingualinked.worker").warning("%d", number)
    kept = forwarding.drain()
    assert (len(kept), kept[-1][2]) == (1000, "1499")

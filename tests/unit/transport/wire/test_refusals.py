from __future__ import annotations

import logging

import pytest

from lingualinked.transport.wire.refusals import Refusals


def test_everything_is_counted_and_the_first_of_each_kind_logged(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals("me")
    for sender, kind in [("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), ("b", "x")]:
        refusals.add(sender, kind, f"detail of {sender} {kind}")
    assert refusals.num == 5
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert [record.name for record in caplog.records] == ["lingualinked.transport"] * 3
    assert "'me'" in caplog.text
    assert "detail of b x" in caplog.text

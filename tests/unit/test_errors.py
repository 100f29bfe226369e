"""Errors are sent between processes of the user's: a copy says and holds what the error does."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - as a process pool sends them

import pytest

import lingualinked as ll


@pytest.mark.parametrize(
    "error",
    [
        ll.ArgumentError("no such device"),
        ll.WorkerDiedError("nas", "killed by signal 9"),
        ll.DaemonError("nas", "tcp://10.0.0.5:5600", "nothing listens there"),
        ll.UnreachableError("caller", "nas", "tcp://10.0.0.5:5601", "no answer"),
        ll.StepTimeoutError("no answer within 1 s"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_copy_says_the_same(error: ll.LingualinkedError) -> None:
    for copied in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)

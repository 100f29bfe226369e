from __future__ import annotations

import select
from typing import Any

from lingualinked.transport.sockets.waker import Waker


def is_readable(waker: Waker) -> bool:
    return bool(select.select([waker], [], [], 0)[0])


def test_the_descriptor_shows_the_flag() -> None:
    waker = Waker()
    assert not is_readable(waker)
    assert not waker.clear()
    for _ in range(3):
        waker.set()
    assert is_readable(waker)
    assert waker.clear()
    assert not is_readable(waker)
    assert not waker.clear()
    waker.close()


def test_set_never_blocks() -> None:
    waker = Waker()
    for _ in range(2_000):
        waker.set()
    assert waker.clear()
    assert not is_readable(waker)
    waker.close()


def test_setting_a_closed_one_does_nothing() -> None:
    waker = Waker()
    waker.close()
    waker.set()
    waker.close()


def test_a_set_in_the_middle_of_clear_is_not_lost() -> None:
    """As from a finalizer that runs in the middle of the call."""
    waker = Waker()
    reader = waker._reader

    class Interrupting:
        def recv(self, size: int) -> bytes:
            waker._reader = reader
            waker.set()
            return reader.recv(size)

    interrupting: Any = Interrupting()
    waker.set()
    waker._reader = interrupting
    assert waker.clear()
    assert is_readable(waker)
    assert waker.clear()
    assert not is_readable(waker)
    waker.close()

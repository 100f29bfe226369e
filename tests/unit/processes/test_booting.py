"""A worker's key against its boot record: in that order, and nothing for who says something else."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from lingualinked.errors import ArgumentError, ClosedError
from lingualinked.processes.booting import Booting
from lingualinked.protocol.boot import Boot, Emulation

BOOT = Boot(
    name="a",
    socket_folder="/nowhere",
    caller_address="ipc:///nowhere",
    caller_key="key",
    caller_pid=1,
    accelerator="cpu",
    threads=1,
    cpus=None,
    memory_bytes=None,
    max_frame_bytes=1,
    shared_memory=True,
    log_level=30,
    emulation=Emulation(slowdown=1.0, links=(), delayed_from=()),
)


class Admission:
    """Who has been let in, or why nobody is."""

    def __init__(self, error: Exception | None = None) -> None:
        self.admitted: list[tuple[str, str]] = []
        self.error = error

    def __call__(self, name: str, public_key: str) -> None:
        if self.error is not None:
            raise self.error
        self.admitted.append((name, public_key))


@pytest.fixture
def ends() -> Iterator[tuple[Booting, socket.socket]]:
    ours, theirs = socket.socketpair()
    booting = Booting(ours, BOOT)
    with theirs:
        yield booting, theirs
    booting.close()


def test_a_worker_is_told_who_it_is_once_its_key_is_known(ends: tuple[Booting, socket.socket]) -> None:
    (booting, worker), admission = ends, Admission()
    for part in (b'{"public', b'_key": "k"}', b"\n"):
        assert booting.fileno() >= 0
        worker.sendall(part)
        booting.answer(admission)
    assert admission.admitted == [("a", "k")]
    assert booting.fileno() == -1
    assert msgspec.json.decode(worker.recv(65536), type=Boot) == BOOT
    assert worker.recv(1) == b""


@pytest.mark.parametrize("said", [b"\n", b"no key\n", b"[]\n", b'{"public_key": 1}\n', b"\xff\n", None])
def test_who_says_something_else_is_told_nothing(said: bytes | None, ends: tuple[Booting, socket.socket]) -> None:
    (booting, worker), admission = ends, Admission()
    if said is None:
        worker.shutdown(socket.SHUT_WR)
    else:
        worker.sendall(said)
    booting.answer(admission)
    assert (admission.admitted, booting.fileno()) == ([], -1)
    assert worker.recv(1) == b""


@pytest.mark.parametrize("error", [ArgumentError("no key"), ClosedError("closed")])
def test_who_is_not_let_in_is_told_nothing(error: Exception, ends: tuple[Booting, socket.socket]) -> None:
    booting, worker = ends
    worker.sendall(b'{"public_key": "k"}\n')
    booting.answer(Admission(error))
    assert booting.fileno() == -1
    assert worker.recv(1) == b""

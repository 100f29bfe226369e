"""A worker's key against its boot record: in that order, and nothing for who says something else."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from lingualinked.processes.booting import Booting
from lingualinked.protocol.boot import Boot, Emulation

BOOT = Boot(
    name="a",
    socket_folder="/nowhere",
    caller_address="ipc:///nowhere",
    caller_key="key",
    starter_pid=1,
    same_host=True,
    tcp=None,
    accelerator="cpu",
    threads=1,
    cpus=None,
    memory_bytes=None,
    max_frame_bytes=1,
    shared_memory=True,
    log_level=30,
    emulation=Emulation(slowdown=1.0, links=(), delayed_from=()),
)


@pytest.fixture
def ends() -> Iterator[tuple[Booting, socket.socket]]:
    ours, theirs = socket.socketpair()
    booting = Booting(ours)
    with theirs:
        yield booting, theirs
    booting.close()


def test_a_worker_says_its_key_and_is_told_who_it_is(ends: tuple[Booting, socket.socket]) -> None:
    booting, worker = ends
    for part in (b'{"public', b'_key": "k"}'):
        worker.sendall(part)
        assert booting.fileno() >= 0
        assert booting.read_key() is None
    worker.sendall(b"\n")
    assert booting.read_key() == "k"
    assert booting.fileno() == -1  # nothing is to be read any more, however long the answer takes
    booting.send_boot(BOOT)
    assert msgspec.json.decode(worker.recv(65536), type=Boot) == BOOT
    assert worker.recv(1) == b""


@pytest.mark.parametrize("said", [b"\n", b"no key\n", b"[]\n", b'{"public_key": 1}\n', b"\xff\n", None])
def test_who_says_something_else_is_told_nothing(said: bytes | None, ends: tuple[Booting, socket.socket]) -> None:
    booting, worker = ends
    if said is None:
        worker.shutdown(socket.SHUT_WR)
    else:
        worker.sendall(said)
    assert booting.read_key() is None
    assert booting.fileno() == -1
    assert worker.recv(1) == b""
    booting.send_boot(BOOT)  # does nothing


def test_who_is_not_let_in_is_told_nothing(ends: tuple[Booting, socket.socket]) -> None:
    booting, worker = ends
    worker.sendall(b'{"public_key": "k"}\n')
    assert booting.read_key() == "k"
    booting.close()
    assert worker.recv(1) == b""

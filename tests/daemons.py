"""Daemons as a test starts them: real processes of `lingualinked worker`, on this machine's loopback interface.

Knows command lines, the line that a daemon prints, and devices; nothing of models.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest

import lingualinked as ll
from lingualinked.transport.keys.key_files import make_key
from lingualinked.transport.keys.keys import KeyPair


class DaemonProcess:
    """A daemon with a home of its own; a context manager that ends it.

    Parameters
    ----------
    home : Path
        Where its keys and its log go.
    client : str
        Public key that it lets in for this run; empty: only those on its list.
    arguments : str
        Further arguments of ``lingualinked worker``, also another ``--bind``.
    """

    def __init__(self, home: Path, client: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._log = home / "daemon.log"
        authorize = ["--authorize", client] if client else []
        bind = [] if "--bind" in arguments else ["--bind", "tcp://127.0.0.1:0"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lingualinked.worker", *bind, *authorize, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "XDG_CONFIG_HOME": str(home / "config"), **(environment or {})},
                start_new_session=True,
            )
        self.address = self.server_key = ""

    def wait_until_it_listens(self, timeout_s: float = 60.0) -> Self:
        """Read the line that says where it listens, and its key."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], timeout_s)[0], f"the daemon is silent:\n{self.log()}"
        line = self.process.stdout.readline().decode().strip()
        assert re.fullmatch(r"tcp://[^#]+:\d+#.{40}", line), f"{line!r}:\n{self.log()}"
        self.address, _, self.server_key = line.partition("#")
        return self

    def device(self, name: str, **fields: Any) -> ll.Device:
        """Return a device that this daemon is of."""
        return ll.Device(name=name, **{"address": self.address, "server_key": self.server_key, **fields})

    def log(self) -> str:
        """Return what it has written to standard error."""
        return self._log.read_text()

    def wait_for_log(self, words: str, timeout_s: float = 30.0) -> None:
        """Wait until its log has some words."""
        deadline = time.monotonic() + timeout_s
        while words not in self.log():
            assert time.monotonic() < deadline, f"{words!r} is not in the log:\n{self.log()}"
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """Return the processes of its workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.ppid() != self.process.pid]

    def wait_until_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until it has no worker."""
        deadline = time.monotonic() + timeout_s
        while self.workers():
            assert time.monotonic() < deadline, f"workers remain: {self.workers()}\n{self.log()}"
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Send it a signal and wait for its end; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self.end()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Daemons:
    """Starts daemons that let in this process's key, and ends them."""

    def __init__(self, folder: Path, keys: KeyPair) -> None:
        self.keys = keys
        self._folder = folder
        self._ends = contextlib.ExitStack()
        self._num = 0

    def start(self, *arguments: str) -> DaemonProcess:
        """Start a daemon with further arguments; returns once it listens. It may be ended earlier, as a context manager."""
        self._num += 1
        home = self._folder / str(self._num)
        daemon = self._ends.enter_context(DaemonProcess(home, self.keys.public, "--threads", "1", *arguments))
        return daemon.wait_until_it_listens()

    def close(self) -> None:
        """End all of them."""
        self._ends.close()


@contextlib.contextmanager
def running_daemons(folder: Path) -> Iterator[Daemons]:
    """Make a key "default" for this process, in a configuration folder of its own, and daemons possible that let it in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        daemons = Daemons(folder, make_key("default"))
        try:
            yield daemons
        finally:
            daemons.close()

"""Processes as a test sees them: those of a cluster, and a user's script that runs beside the tests.

Knows process ids and lines of text; nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from waiting import wait_until


def fork_server(cluster: Any) -> psutil.Process:
    """The process that forks a cluster's workers, perhaps those of other clusters too."""
    return psutil.Process(cluster._workers.launcher._starter.server.process.pid)


def family(cluster: Any) -> list[psutil.Process]:
    """Every process that is to end with a cluster: its workers, and the fork server if no other cluster uses it."""
    server = getattr(cluster._workers.launcher._starter, "server", None)  # none where nothing is forked
    alone = server is not None and server.num_users == 1
    pids = [*cluster.pids.values(), *([server.process.pid] if alone else [])]
    return [psutil.Process(pid) for pid in sorted(pids)]


def are_gone(processes: Iterable[psutil.Process]) -> bool:
    """Whether they have all ended; one that only its parent has still to take note of has."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def stopped(pid: int) -> None:
    """Stop a process with SIGSTOP, and wait until it is."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


class Program:
    """A program that runs beside the tests; a context manager that leaves no process of it behind.

    It says something by printing it as JSON, a line each; at the end its standard input is closed.

    Parameters
    ----------
    command : sequence of str or Path
        What to run.
    folder : Path
        Where its standard error goes.
    cwd : Path or None
        The folder that it runs in; ``None``: this process's own.
    environment : mapping or None
        All its environment variables; ``None``: this process's own.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._errors = folder / "errors.txt"
        self._heard = b""
        self._is_closed = False
        self.printed: list[str] = []  # lines that are no JSON
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,  # what is read ahead, no select sees
                cwd=cwd,
                env=environment,
                start_new_session=True,  # so that what it forks is found when a test fails
            )

    def hear(self, timeout_s: float = 90.0) -> Any:
        """Wait for the next thing that it says as JSON."""
        while True:
            line = self._read_line(timeout_s)
            if line.startswith((b"{", b"[", b'"')):  # not what a library prints
                return json.loads(line)
            self.printed.append(line.decode(errors="replace"))

    def read_until(self, text: str, timeout_s: float = 90.0) -> str:
        """Wait for a line of its output that has this text; return the line."""
        while True:
            line = self._read_line(timeout_s).decode(errors="replace")
            if text in line:
                return line

    def _read_line(self, timeout_s: float) -> bytes:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while True:
            line, newline, rest = self._heard.partition(b"\n")
            if newline:
                self._heard = rest
                return line
            left_s = max(0.0, deadline - time.monotonic())
            assert select.select([self.process.stdout], [], [], left_s)[0], f"the program is silent:\n{self.errors()}"
            data = self.process.stdout.read(4096)
            assert data, f"the program has ended:\n{self._heard!r}\n{self.errors()}"
            self._heard += data

    def tell(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")

    def end(self, timeout_s: float = 60.0) -> int:
        """Close its standard input and wait for its end; return the exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(timeout_s)

    def errors(self) -> str:
        """Return what it has written to standard error."""
        return self._errors.read_text()

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """End it with all that it has started in its session; does nothing the second time."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Script(Program):
    """A user's script in a Python of its own.

    Parameters
    ----------
    code : str
        The script.
    folder : Path
        Where its file goes.
    cwd : Path or None
        The folder that it runs in; ``None``: this process's own.
    """

    def __init__(self, code: str, folder: Path, *, cwd: Path | None = None) -> None:
        path = folder / "script.py"
        path.write_text(code)
        super().__init__([sys.executable, path], folder, cwd=cwd)

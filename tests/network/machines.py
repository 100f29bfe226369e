"""Machines of a test: on hosts of a network, daemons that serve devices, and callers that drive them.

Knows how each is started and asked; not what a test wants of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

from lingualinked.transport.keys.key_files import find_daemon_keys, make_key
from lingualinked.transport.keys.key_lists import authorize_client
from network.hosts import Host
from processes import Program

PORT = 5600
"""Where daemons listen."""

START_S = 120.0
"""Until a daemon has imported torch and transformers, on a machine that does much else."""


class Daemon:
    """The daemon of a host; it starts at once, and is ready after `wait`.

    Parameters
    ----------
    host : Host
        Where it runs.
    *options : str
        Of ``lingualinked worker``, beside ``--bind`` and ``--name``.
    clients : list of str
        Public keys of those who may use it, beside those that its user has authorised already.
    """

    def __init__(self, host: Host, *options: str | Path, clients: list[str]) -> None:
        self.host = host
        with as_user_of(host):
            self.public_key = find_daemon_keys().public
            for public_key in clients:
                with contextlib.suppress(Exception):  # it is authorised already
                    authorize_client(public_key)
        self.address = f"tcp://{host.address}:{PORT}"
        self._options = options
        self._own_pids: set[int] = set()
        self.program = self._start()

    @staticmethod
    def command(host: Host, *options: str | Path) -> tuple[str | Path, ...]:
        """Return the command that starts a daemon on a host."""
        return (
            sys.executable,
            "-m",
            "lingualinked.worker",
            "--bind",
            f"tcp://0.0.0.0:{PORT}",
            "--name",
            host.name,
            *options,
        )

    def _start(self) -> Program:
        return self.host.start(*self.command(self.host, *self._options))

    def wait(self) -> None:
        """Wait until it serves callers; what runs here then is its own."""
        self.program.read_until(self.public_key, START_S)
        self._own_pids = set(self.host.pids())

    def restart(self) -> None:
        """Start it again after its end."""
        self.program.close()
        self.program = self._start()
        self.wait()

    @property
    def pid(self) -> int:
        """Its process."""
        return self.program.process.pid

    @property
    def worker_pids(self) -> set[int]:
        """Processes of this host beside the daemon and what it has started for all its callers."""
        return set(self.host.pids()) - self._own_pids

    def device(self, **fields: object) -> str:
        """Return Python text that makes the device of this daemon."""
        given = {"name": self.host.name, "address": self.address, "server_key": self.public_key, "threads": 1, **fields}
        return f"ll.Device({', '.join(f'{name}={value!r}' for name, value in given.items() if value is not None)})"


class CallerError(Exception):
    """What a caller's code has raised there."""

    def __init__(self, kind: str, message: str, seconds: float, traceback: str) -> None:
        super().__init__(f"{kind} after {seconds:.2f} s: {message}\n{traceback}")
        self.kind = kind
        self.message = message
        self.seconds = seconds


class Caller:
    """A Python on a host that runs what it is asked to, piece by piece, with `lingualinked` as ``ll``.

    Parameters
    ----------
    host : Host
        Where it runs, as that host's user.
    key : str or None
        Name of the key that it makes there if there is none; ``None``: it makes none.
    """

    def __init__(self, host: Host, key: str | None = "default") -> None:
        self.host = host
        self.public_key = "" if key is None else own_key(host, key)
        self.program = host.start(sys.executable, Path(__file__).with_name("caller_program.py"))

    def run(self, code: str, timeout_s: float = 90.0, **values: object) -> Any:
        """Run code there; return what it has assigned to ``result``, or raise CallerError."""
        self.ask(code, **values)
        return self.answer(timeout_s)

    def ask(self, code: str, **values: object) -> None:
        """Begin to run code there."""
        self.program.tell(json.dumps({"code": code, "values": values}))

    def answer(self, timeout_s: float = 90.0) -> Any:
        """Wait for what the code that was begun has assigned to ``result``."""
        said = self.program.hear(timeout_s)
        self.seconds = said["seconds"]  # that it took
        if "error" in said:
            raise CallerError(said["error"], said["message"], said["seconds"], said["traceback"])
        return said["result"]

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.program.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.program.close()


def own_key(host: Host, name: str = "default") -> str:
    """Return a public key of a host's user, made if there is none."""
    with as_user_of(host):
        path = Path(os.environ["XDG_CONFIG_HOME"]) / "lingualinked" / "keys" / f"{name}.pub"
        return path.read_text().split()[0] if path.exists() else make_key(name).public


@contextlib.contextmanager
def as_user_of(host: Host) -> Iterator[None]:
    """Read and write the configuration of a host's user in this process."""
    with mock.patch.dict(os.environ, {"XDG_CONFIG_HOME": host.environment["XDG_CONFIG_HOME"]}):
        yield

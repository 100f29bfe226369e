"""A Ray cluster of two nodes, and programs that drive it, each in a process of its own: Ray does not leave one that it was in.

Knows processes and what programs print; nothing of models.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

import psutil
import pytest

from leftovers import RUN_VARIABLE

NODES = Path(__file__).with_name("two_nodes.py")
PATIENCE_S = 90.0  # on a machine that does other things too
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
PRELUDE = """
import json
import os
import sys

os.set_inheritable(int(sys.argv[1]), False)

def say(value):
    os.write(int(sys.argv[1]), json.dumps(value).encode() + b"\\n")
"""


def read_line(stream: IO[bytes] | io.RawIOBase | None) -> str:
    """Read a line from a program that may take its time."""
    assert stream is not None
    assert select.select([stream], [], [], PATIENCE_S)[0], "the program is silent"
    return stream.readline().decode()


class Program:
    """A program in a process of its own; what it says is a line each, in a pipe of its own: Ray writes to the usual output."""

    def __init__(self, code: str, environment: dict[str, str]) -> None:
        reader, writer = os.pipe()
        self._said = os.fdopen(reader, "rb", buffering=0)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(writer)],
            pass_fds=(writer,),
            env={**os.environ, **ENVIRONMENT, **environment},
        )
        os.close(writer)

    def hear(self) -> Any:
        """Return what it says next."""
        line = read_line(self._said)
        assert line, "the program has ended without a word"
        return json.loads(line)

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._said.close()


class Nodes:
    """The two nodes."""

    def __init__(self, pid: int, address: str) -> None:
        self._process = psutil.Process(pid)
        self._address = address

    def run(self, code: str, **environment: str) -> Program:
        """Start a program that Ray's own variable leads to the nodes."""
        return Program(code, {"RAY_ADDRESS": self._address, **environment})

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the processes on the nodes that have a word in their command lines."""
        found = []
        for process in self._process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_until_free(self) -> None:
        """Wait until nothing of a cluster is on the nodes: no actor, no daemon, no worker."""
        deadline = time.monotonic() + PATIENCE_S
        while left := [*self.processes("DaemonActor"), *self.processes("lingualinked")]:
            assert time.monotonic() < deadline, f"left on the nodes: {left}"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """Two nodes of two cores each; no test is taken to leave the processes that Ray keeps there."""
    environment = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name != RUN_VARIABLE}
    with subprocess.Popen(
        ["setsid", "--fork", sys.executable, str(NODES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        pid, address = read_line(process.stdout).split()
        yield Nodes(int(pid), address)
        process.stdin.close()
        psutil.wait_procs([psutil.Process(int(pid))], PATIENCE_S)

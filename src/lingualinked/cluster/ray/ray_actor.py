"""The actor that holds a device's daemon on a node of a Ray cluster.

Its arguments and answers are text. Knows neither clusters nor models.
"""

from __future__ import annotations

import collections
import os
import socket
import subprocess
import sys
import threading
from typing import IO

from lingualinked.processes.server_process import how_it_ended, import_path

_LAST_LINES = 20


class DaemonActor:
    """A daemon for one caller, on this node: it ends with the actor, however that ends, and the actor with it.

    Parameters
    ----------
    *options : str
        Of ``lingualinked worker``, beside those that say where it listens and how it ends.

    Raises
    ------
    RuntimeError
        If the daemon ends instead of listening; the message has its last words.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._start()

    def listen(self, ended: str = "") -> str:
        """Return where the daemon listens, ``tcp://HOST:PORT#PUBLIC-KEY``, once it is not where one ``ended`` that did."""
        if self._line == ended:
            assert self._daemon.stdin is not None
            self._daemon.stdin.close()  # it ends, if it has not yet
            self._daemon.wait()
            self._start()
        return self._line

    def _start(self) -> None:
        from ray.util import get_node_ip_address

        host = get_node_ip_address()
        bind = f"tcp://[{host}]:0" if ":" in host else f"tcp://{host}:0"
        self._daemon = subprocess.Popen(
            # Standard input is what it lives by: nobody else holds the other end.
            [sys.executable, "-P", "-m", "lingualinked.worker", "--bind", bind, "--once", "--lifeline", *self._options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(import_path())},
        )
        words: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        reader = threading.Thread(target=_pass_on, args=(self._daemon.stderr, words), daemon=True)
        reader.start()
        assert self._daemon.stdout is not None
        self._line = self._daemon.stdout.readline().strip()
        if not self._line:
            ended = how_it_ended(self._daemon.wait())
            reader.join()
            raise RuntimeError(f"`lingualinked worker` on {socket.gethostname()} ({host}): {ended}; {''.join(words)}")
        threading.Thread(target=_end_with, args=(self._daemon,), daemon=True).start()


def _end_with(daemon: subprocess.Popen[str]) -> None:
    """End this process after a daemon that was killed or failed, so that Ray starts the actor again."""
    if daemon.wait() != 0:
        os._exit(1)


def _pass_on(errors: IO[str], words: collections.deque[str]) -> None:
    """Pass on to Ray's log what a daemon writes, and keep the last of it."""
    for line in errors:
        words.append(line)
        sys.stderr.write(line)

"""Ends the process when its caller has ended, for whatever reason, and removes the folder of its sockets.

Knows two signs: the caller's end of the socket has closed, or the caller's process has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import threading
from typing import NoReturn


class Lifeline:
    """A thread that ends this process as soon as the caller has ended; `close` stops it.

    The caller holds the other end of the descriptor `channel`. Its process is watched too, since a forked child of the
    caller may keep that end open.
    """

    def __init__(self, channel: int, caller_pid: int, socket_folder: str) -> None:
        self._folder = socket_folder
        self._stopped, self._stop = os.pipe()
        self._caller: int | None = None
        self._poller = select.poll()
        # A hang-up is always reported. A half-closed socket needs a flag: other workers of the cluster may keep it half open.
        self._poller.register(channel, getattr(select, "POLLRDHUP", 0))
        self._poller.register(self._stopped, select.POLLIN)
        if hasattr(os, "pidfd_open"):
            try:
                self._caller = os.pidfd_open(caller_pid)
                self._poller.register(self._caller, select.POLLIN)
            except ProcessLookupError:
                end_process(socket_folder)
            except OSError:
                pass  # a kernel without pidfds: only the socket is watched
        self._thread = threading.Thread(target=self._wait, name="lingualinked-lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the process no longer depends on the caller."""
        os.close(self._stop)
        self._thread.join()
        os.close(self._stopped)
        if self._caller is not None:
            os.close(self._caller)

    def _wait(self) -> None:
        ready = []
        with contextlib.suppress(Exception):
            ready = self._poller.poll()
        if all(descriptor != self._stopped for descriptor, _ in ready):
            end_process(self._folder)


def end_process(socket_folder: str) -> NoReturn:
    """Remove the folder of the sockets, as other processes may do at the same time, and end this process at once."""
    shutil.rmtree(socket_folder, ignore_errors=True)
    os._exit(0)  # with torch loaded, a normal exit takes seconds

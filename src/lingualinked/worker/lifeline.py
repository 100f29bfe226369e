"""Ends the worker when its caller is gone, however the caller went.

Knows two signs: the caller's end of the socket has closed, or the caller's process has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading


def watch_caller(channel: int, caller_pid: int) -> None:
    """End this process as soon as the caller is gone.

    Parameters
    ----------
    channel : int
        Descriptor whose other end the caller holds; hanging up is the first sign.
    caller_pid : int
        The caller; its end is the second sign, for when a forked child of it still holds the other end.
    """
    poller = select.poll()
    poller.register(channel, 0)  # hang-up is always reported
    if hasattr(os, "pidfd_open"):
        try:
            poller.register(os.pidfd_open(caller_pid), select.POLLIN)
        except ProcessLookupError:
            os._exit(0)
        except OSError:
            pass  # a kernel without pidfds: the socket alone decides

    def wait() -> None:
        with contextlib.suppress(Exception):
            poller.poll()
        os._exit(0)

    threading.Thread(target=wait, name="lingualinked-lifeline", daemon=True).start()

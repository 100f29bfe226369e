"""Resets the state that a started process inherits from its caller and must not depend on.

Knows signals and limits; the code that starts the process sets its working folder and umask.
"""

from __future__ import annotations

import contextlib
import signal
import sys

# Python itself ignores them, so that they become errors.
_IGNORED_BY_PYTHON = {getattr(signal, name, None) for name in ("SIGPIPE", "SIGXFSZ")}


def shed_inheritance() -> None:
    """Block no signal, ignore none but interrupts, and allow as many open files as may be allowed."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN and number not in _IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
    allow_open_files()


def allow_open_files() -> None:
    """Allow this process as many open files as may be allowed."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS reports no limit, and accepts less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""Sheds what a started process has inherited from its caller's state, and must not depend on.

Knows signals and limits; working folder and umask are set where the process is started.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's business
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS calls its limit infinite and takes less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""What a way of starting workers offers to who watches them.

Knows neither of the two ways: `lingualinked.processes.forked_workers` and `lingualinked.processes.spawned_workers`.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from lingualinked.processes.booting import Booting
from lingualinked.processes.server_process import ErrorFile


class WorkerProcess(abc.ABC):
    """One worker, if known: `pid` and `handle`, a pidfd where there is such a thing, are ``None`` until it is."""

    def __init__(self, booting: Booting, name: str, pid: int | None = None, handle: int | None = None) -> None:
        self.booting = booting
        self.name = name
        self.pid = pid
        self.handle = handle  # readable once it has ended
        self.ended = False
        self.given_up = False  # nobody is told of its end
        self.gone = threading.Event()

    @abc.abstractmethod
    def kill(self) -> None:
        """Force its end, if it has begun."""

    @abc.abstractmethod
    def end_by(self, deadline: float) -> None:
        """Wait for its end until ``deadline`` (monotonic seconds), then force it."""

    @abc.abstractmethod
    def detach_after_fork(self) -> None:
        """Close its descriptors in a forked child of the caller."""


P = TypeVar("P", bound=WorkerProcess)


class WorkerStarter(Protocol[P]):
    """A way of starting the workers of one cluster, and of learning how they end.

    Each takes the transformers classes whose code the workers will need, and raises `ResourceError` if there is no folder
    for sockets.
    """

    socket_folder: str  # where the sockets of the cluster are to lie; it goes with the starter
    errors: ErrorFile  # what the workers write to their standard output and error

    def start(self, name: str, register: Callable[[P], None]) -> None:
        """Start one worker; it is registered before anything can be heard of it."""

    def descriptors(self, living: Iterable[P]) -> list[int | None]:
        """Say what becomes readable when one of these ends; ``None``: something of which only time can tell."""

    def read(self, ready: set[int], workers: Iterable[P]) -> None:
        """Note what is said of workers on those of `descriptors` that are readable."""

    def how_ended(self, worker: P, ready: set[int]) -> str | None:
        """Say in words how a worker has ended, once `read` has noted what there is; ``None``: it is not known to have ended."""

    def hang_up(self, workers: Iterable[P]) -> None:
        """Let the workers see that the caller is done with them."""

    def close_by(self, deadline: float) -> None:
        """Let go of what the workers shared, which have ended or do so until ``deadline`` (monotonic seconds)."""

    def detach_after_fork(self) -> None:
        """Close all descriptors in a forked child of the caller; the workers belong to the parent."""

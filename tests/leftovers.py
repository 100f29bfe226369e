"""What this process holds that could outlive a test: processes, threads, descriptors, temporary files.

Knows no lingualinked: it compares what is held now with what was held before.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

RUN_VARIABLE = "LINGUALINKED_TEST_RUN"
"""Environment variable that a test run's processes inherit, so that orphans are found too."""

SHARED_MEMORY = "/memfd:"
"""What a descriptor of memory that processes share is on, as it is said in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Belongings:
    """What is held at one moment.

    Parameters
    ----------
    processes : frozenset of psutil.Process
        Descendants and orphans, zombies that nobody waited for included; a process is told by its pid and start time.
    threads : frozenset of threading.Thread
        Python threads that are alive.
    descriptors : Counter of str
        How many open descriptors there are of each kind (``socket:``) or on each file; empty where ``/proc`` is not.
    files : frozenset of Path
        Entries of the temporary folder, socket files among them.
    """

    processes: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    descriptors: Counter[str]
    files: frozenset[Path]

    @classmethod
    def now(cls) -> Belongings:
        return cls(
            processes=_processes.living(),
            threads=frozenset(filter(_counts, threading.enumerate())),
            descriptors=_descriptors(),
            files=frozenset(Path(tempfile.gettempdir()).iterdir()),
        )

    def since(self, before: Belongings) -> list[str]:
        """Say in words what is held now that was not held before."""
        return [
            *(f"process {_describe(process)}" for process in self.processes - before.processes),
            *(f"thread {thread!r}" for thread in self.threads - before.threads),
            *(f"{number} more of {kind}" for kind, number in (self.descriptors - before.descriptors).items()),
            *(f"{_kind(path)} {path}" for path in self.files - before.files),
        ]


def left_since(before: Belongings, timeout_s: float = 5.0, ignored: str | None = None) -> list[str]:
    """Say what is still held `timeout_s` after the first look; return as soon as nothing is.

    Endings that are already under way (a process that is exiting, a thread pool that was told to stop) are waited
    for, and objects in reference cycles are collected. What `ignored` occurs in is not said.
    """

    def look() -> list[str]:
        return [item for item in Belongings.now().since(before) if ignored is None or ignored not in item]

    left = look()
    deadline = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)  # a descriptor that closes tells nobody: look again
        left = look()
    return left


class _Processes:
    """This process's descendants, and orphans of its run; each process of the machine is looked at once."""

    def __init__(self) -> None:
        self._ours: dict[int, psutil.Process] = {}
        self._foreign: set[int] = set()

    def living(self) -> frozenset[psutil.Process]:
        """Return those that there are, zombies included."""
        pids = set(psutil.pids()) - {os.getpid()}
        self._foreign &= pids
        self._ours = {pid: each for pid, each in self._ours.items() if pid in pids and each.is_running()}
        parents: dict[int, int] = {}
        for pid in pids - self._foreign - self._ours.keys():
            with contextlib.suppress(psutil.Error):
                parents[pid] = psutil.Process(pid).ppid()
        run = f"{RUN_VARIABLE}={os.environ.get(RUN_VARIABLE)}".encode()
        for pid in parents:
            environment, ancestor = _environment(pid), pid
            while ancestor in parents:
                ancestor = parents[ancestor]
            if ancestor == os.getpid() or ancestor in self._ours or run in environment:
                with contextlib.suppress(psutil.Error):
                    self._ours[pid] = psutil.Process(pid)
            elif environment or not _runs_program(pid):  # one that is about to run another shows no environment
                self._foreign.add(pid)
        return frozenset(self._ours.values())


def _environment(pid: int) -> bytes:
    """Return the environment that a process was started with, if it can be read."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _runs_program(pid: int) -> bool:
    """Whether it is a program, not a thread of the kernel or another user's."""
    try:
        return bool(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return False


_processes = _Processes()


def _counts(thread: threading.Thread) -> bool:
    if isinstance(
        thread, threading._DummyThread
    ):  # a foreign thread that once called into Python: never listed as ended
        return False
    return type(thread).__name__ != "TMonitor"  # tqdm's own, one per process for good


def _descriptors() -> Counter[str]:
    kinds: Counter[str] = Counter()
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return kinds
    for entry in folder.iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if target.startswith("/dev/nvidia"):  # the driver opens more as a process goes on
            continue
        kinds[target.split("[", maxsplit=1)[0] if target.startswith(("socket:", "pipe:")) else target] += 1
    return kinds


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())}"
    except psutil.ZombieProcess:
        return f"{process.pid}: ended, but nobody waited for it"
    except psutil.NoSuchProcess:
        return f"{process.pid}: just gone"


def _kind(path: Path) -> str:
    return "socket file" if path.is_socket() else "folder" if path.is_dir() else "file"

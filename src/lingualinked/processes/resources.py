"""What the operating system still allows this process: open files, threads and processes, a working folder.

Knows limits and how to ask for them; it is asked before anything starts, since libzmq ends the process where they fail it.
"""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from lingualinked.device import Device
from lingualinked.errors import ResourceError
from lingualinked.quantities import count_text

# Counted on running clusters, with some to spare for the libraries that are imported meanwhile.
_DESCRIPTORS = 38
_DESCRIPTORS_PER_WORKER = 4
_DESCRIPTORS_FOR_DAEMONS = 12
_DESCRIPTORS_PER_DAEMON = 6  # beside those for its worker
_DESCRIPTORS_TO_ADD = 8
_TASKS = 10
_TASKS_PER_WORKER = 6  # beside its compute threads
_TASKS_FOR_DAEMONS = 3


def check_start(devices: Sequence[Device]) -> None:
    """Raise ResourceError unless a cluster can start with workers on these devices."""
    _check_working_folder()
    num_daemons = sum(device.address is not None for device in devices)
    num_descriptors = _DESCRIPTORS + _DESCRIPTORS_PER_WORKER * len(devices) + _DESCRIPTORS_PER_DAEMON * num_daemons
    _check_descriptors(num_descriptors + (_DESCRIPTORS_FOR_DAEMONS if num_daemons else 0))
    _check_tasks(_TASKS + sum(map(_tasks_of, devices)) + (_TASKS_FOR_DAEMONS if num_daemons else 0))


def check_addition(device: Device) -> None:
    """Raise ResourceError unless one more worker can start."""
    _check_descriptors(_DESCRIPTORS_TO_ADD + (_DESCRIPTORS_PER_DAEMON if device.address is not None else 0))
    _check_tasks(_tasks_of(device))


def start_thread(thread: threading.Thread) -> None:
    """Start a thread, or raise ResourceError if there may be no more."""
    try:
        thread.start()
    except RuntimeError as error:
        raise ResourceError(
            f"no thread can be started{_task_limits()}: raise the limit, or end other threads"
        ) from error


def _tasks_of(device: Device) -> int:
    if device.address is not None:
        return 0  # they run on another host
    return _TASKS_PER_WORKER + (device.threads or 1)


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        if "lingualinked.sharded.loading.load" in sys.modules:  # nor does transformers, which has been imported there
            return
        raise ResourceError(
            "the working folder of this process has been removed, and torch ends a process that imports it there: "
            "change to another one with os.chdir()"
        ) from error


def _check_descriptors(num_needed: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    try:
        num_open = sum(1 for _ in Path("/dev/fd").iterdir()) - 1  # less the one that lists them
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            return  # there is no such folder: what is open is not known
        num_open = limit
    if limit - num_open < num_needed:
        raise ResourceError(
            f"{count_text(num_needed, 'file descriptor')} are needed and {max(limit - num_open, 0)} of {limit} are free: close files, or "
            f"raise the limit with `ulimit -n {num_open + num_needed}` before this program starts"
        )


def _check_tasks(num_needed: int) -> None:
    """Check that so many threads and processes can start, by starting threads: no count covers every limit there is."""
    enough = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(num_needed):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as error:
        raise ResourceError(
            f"{num_needed} more threads and processes are needed and only {len(threads)} can be started{_task_limits()}: "
            "raise the limit, or use fewer devices or threads"
        ) from error
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def _task_limits() -> str:
    """List in parentheses the limits on threads and processes that may apply."""
    limits = []
    if sys.platform != "win32":
        import resource

        for name, number in (("`ulimit -u`", resource.RLIMIT_NPROC), ("`ulimit -v` in bytes", resource.RLIMIT_AS)):
            limit, _ = resource.getrlimit(number)
            if limit != resource.RLIM_INFINITY:
                limits.append(f"{name} is {limit}")
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "pids"):
            top = Path("/sys/fs/cgroup") / controllers
            inside = top / group.lstrip("/")
            folders = [each for each in (inside, *inside.parents) if each.is_relative_to(top)]
            texts = {folder: _read(folder / "pids.max") for folder in folders}
            limits += [f"{folder}/pids.max is {text}" for folder, text in texts.items() if text not in ("", "max")]
    return f" ({'; '.join(limits)})" if limits else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

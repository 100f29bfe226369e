"""Network namespaces of Linux: their names, whether this process may make any, and sockets inside of them.

Knows iproute2 and system calls; not what a test puts there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_NAME = re.compile(r"ll-(\d+)-[0-9a-f]{4}-[\w-]+")
_CLONE_NEWNET = 0x40000000


@cache
def why_unavailable() -> str | None:
    """Return the reason why no namespaces can be made here, or None if they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [name for name in ("bridge", "ip", "ss", "tc") if shutil.which(name) is None]
    if missing:
        return f"iproute2 is not installed: no {' and no '.join(missing)}"
    name = new_name("try")
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
        ip("-n", name, "link", "add", "try2", "type", "bridge")
        tc(
            "-n",
            name,
            "qdisc",
            "add",
            "dev",
            "try0",
            "root",
            "tbf",
            "rate",
            "100mbit",
            "burst",
            "32kb",
            "latency",
            "50ms",
        )
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made here: {' '.join(error.cmd)}: {error.stderr.strip()}"
    finally:
        remove(name)
    return None


def new_name(purpose: str) -> str:
    """Return an unused name; it carries this process's id, by which a later run finds what a crashed one has left."""
    return f"ll-{os.getpid()}-{secrets.token_hex(2)}-{purpose}"


def ip(*arguments: str) -> str:
    """Run ``ip`` of iproute2; return what it prints."""
    return _run("ip", *arguments)


def tc(*arguments: str) -> str:
    """Run ``tc`` of iproute2, which limits rates."""
    return _run("tc", *arguments)


def bridge(*arguments: str) -> str:
    """Run ``bridge`` of iproute2, which sets the states of ports."""
    return _run("bridge", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def ip_json(*arguments: str) -> Any:
    """Run ``ip`` of iproute2; return what it prints as JSON."""
    return json.loads(ip("-j", *arguments))


def pids(name: str) -> list[int]:
    """Return the processes that are in a namespace."""
    return [int(pid) for pid in ip("netns", "pids", name).split()]


def remove(name: str) -> None:
    """Remove a namespace with its interfaces, if it exists; processes that are in it must have ended before."""
    with contextlib.suppress(subprocess.CalledProcessError):
        ip("netns", "del", name)


def remove_stale() -> None:
    """Remove namespaces of test runs that have crashed, and end what these had started in them."""
    folder = Path("/run/netns")
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None or Path(f"/proc/{match[1]}").exists():
            continue
        with contextlib.suppress(subprocess.CalledProcessError):
            for pid in pids(path.name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        remove(path.name)


def inside(name: str, work: Callable[[], T]) -> T:
    """Return ``work()``, done by a thread that is in a namespace: sockets that it makes stay there."""

    def do() -> T:
        with Path(f"/run/netns/{name}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"no way into the namespace {name}")
        return work()

    with ThreadPoolExecutor(1) as executor:  # the thread ends with it: no other work runs there
        return executor.submit(do).result()

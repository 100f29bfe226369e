"""The check that every test leaves nothing behind: it sees what it should, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from leftovers import Belongings, left_since

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

LEAVES_AN_ORPHAN = """
import subprocess, sys
orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
print(orphan.pid)
"""


@pytest.fixture
def before() -> Belongings:
    return Belongings.now()


def test_nothing_is_reported_when_nothing_is_left(before: Belongings) -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)
    threading.Thread(target=lambda: None).start()
    with tempfile.NamedTemporaryFile():
        pass
    assert left_since(before) == []


def test_a_living_child_is_reported(before: Belongings) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        left = left_since(before, timeout_s=0)
        child.communicate(b"\n")
    assert any(f"process {child.pid}:" in item for item in left)
    assert left_since(before) == []


@linux_only
def test_an_unreaped_child_is_reported(before: Belongings) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    left = left_since(before, timeout_s=0)
    child.wait()
    assert left == [f"process {child.pid}: ended, but nobody waited for it"]


@linux_only
def test_an_orphan_is_reported(before: Belongings) -> None:
    parent = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAVES_AN_ORPHAN], stdout=subprocess.PIPE, check=True
    )
    orphan = int(parent.stdout)
    left = left_since(before, timeout_s=0)
    os.kill(orphan, signal.SIGKILL)
    assert any(f"process {orphan}:" in item for item in left)
    assert left_since(before) == []


def test_a_thread_is_reported(before: Belongings) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True, name="forgotten")
    thread.start()
    left = left_since(before, timeout_s=0)
    end.set()
    thread.join()
    assert any("forgotten" in item for item in left)


def test_a_thread_that_is_ending_is_waited_for(before: Belongings) -> None:
    thread = threading.Thread(target=time.sleep, args=(0.1,))
    thread.start()
    assert left_since(before) == []


@linux_only
def test_a_descriptor_is_reported(before: Belongings) -> None:
    with socket.socket():
        assert left_since(before, timeout_s=0) == ["1 more of socket:"]


@linux_only
def test_a_socket_file_is_reported(before: Belongings) -> None:
    path = Path(tempfile.gettempdir()) / "inbox"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    left = left_since(before, timeout_s=0)
    path.unlink()
    assert left == [f"socket file {path}"]

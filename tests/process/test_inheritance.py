"""What a caller's process is like, its workers need not be: signals, working folder, umask, limits and import path."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from processes import Script, are_gone
from waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow]

BEGIN = """
import json, os, pathlib, signal, sys, threading

def say(what):
    print(json.dumps(what), flush=True)

"""

UNLUCKY = """
import resource
import lingualinked as ll
import lingualinked.sharded.loading.load
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.umask(0)
os.mkdir("gone")
os.chdir("gone")
os.rmdir("../gone")
cluster = ll.Cluster(1)
(pid,) = cluster.pids.values()
limits = dict(soft=resource.prlimit(pid, resource.RLIMIT_NOFILE)[0], hard=hard)
say([pid, cluster._workers.launcher._starter.server.process.pid, limits])
os.kill(pid, signal.SIGKILL)
try:
    cluster.workers()
except ll.WorkerDiedError as error:
    say(str(error))
with ll.ShardedModel.from_pretrained(ll.sample_model(), devices=1, plan="even", progress=False) as model:
    say([model.generate(max_new_tokens=3).shape[1]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_caller_that_blocks_signals_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    """Signals blocked or ignored, no working folder, a low limit of open files, umask 0: all of it ends at the caller."""
    with Script(BEGIN + UNLUCKY, tmp_path, cwd=tmp_path) as script:
        _, server, limits = script.hear()
        assert limits["soft"] == limits["hard"]
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{server}/status").read_text().splitlines() if ":\t" in line
        )
        assert int(status["SigBlk"], 16) == 0
        ignored = {number for number in signal.valid_signals() if int(status["SigIgn"], 16) >> (number - 1) & 1}
        assert ignored == {signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ}
        assert status["Umask"] == "0077"
        assert Path(f"/proc/{server}/cwd").readlink() == Path("/")
        assert "killed by signal 9" in script.hear()  # at once: without a signal only the time-out of 600 s tells
        assert script.hear() == [4]
        assert script.end() == 0


GONE = """
import tempfile
tempfile.gettempdir()
import lingualinked as ll
from lingualinked.cluster.cluster import Cluster
os.mkdir("gone")
os.chdir("gone")
os.rmdir("../gone")
try:
    Cluster(1)
except ll.ResourceError as error:
    say(str(error))
"""


def test_a_folder_that_is_gone_where_torch_is_still_to_be_imported(tmp_path: Path) -> None:
    with Script(BEGIN + GONE, tmp_path, cwd=tmp_path) as script:
        assert "working folder of this process has been removed" in script.hear()


PATHS = """
folders = [os.path.abspath(name) for name in ("one", "with:colon", "with\\nline", "named-by-path")]
for folder in folders:
    os.mkdir(folder)
    with open(os.path.join(folder, f"module_{folders.index(folder)}.py"), "w"):
        pass
sys.path += [*folders[:3], pathlib.Path(folders[3])]
import lingualinked as ll
with ll.Cluster(1) as cluster:
    cluster.wait()
    from lingualinked.processes.server_process import import_path
    say(import_path())
"""


def test_the_import_path_is_a_list_of_text(tmp_path: Path) -> None:
    """Python ignores entries that are no text, a pathlib.Path too; an entry may hold the character that joins paths."""
    with Script(BEGIN + PATHS, tmp_path, cwd=tmp_path) as script:
        path = script.hear()
        assert [entry for entry in path if entry.startswith(str(tmp_path))] == [
            str(tmp_path / name) for name in ("one", "with:colon", "with\nline")
        ]
        assert script.end() == 0


STARTS = """
sys.path.insert(0, os.environ["SHADOWS"])
import lingualinked as ll
cluster = ll.Cluster(1)
server = cluster._workers.launcher._starter.server
say([server.process.pid, server.socket_folder])
threading.Event().wait()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing is forked here")
def test_a_fork_server_that_still_imports_ends_with_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("import time\nwhile True:\n    time.sleep(0.1)\n")
    monkeypatch.setenv("SHADOWS", str(tmp_path))
    (tmp_path / "script").mkdir()
    with Script(BEGIN + STARTS, tmp_path / "script") as script:
        pid, folder = script.hear()
        server = psutil.Process(pid)
        assert Path(folder).is_dir()
        script.process.kill()
        wait_until(lambda: are_gone([server]))
        wait_until(lambda: not Path(folder).exists())

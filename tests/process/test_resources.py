"""Too few descriptors, threads or processes, or no folder to write to: an error names the limit before anything starts."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import Script

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them"),
]

# Each attempt is made in a forked child, which has imported everything already.
BEGIN = """
import json, os, resource, sys
from pathlib import Path
import lingualinked as ll
import lingualinked.cluster.messaging.engine
import lingualinked.sharded.loading.load
import torch

Device, ShardedModel, ResourceError, path = ll.Device, ll.ShardedModel, ll.ResourceError, ll.sample_model()

def say(what):
    print(json.dumps(what), flush=True)

def attempt(limit, number, use):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
        limit(number)
        try:
            outcome = use()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(1, outcome.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        outcome = answer.read()
    status = os.waitpid(child, 0)[1]
    say(outcome if not status else f"status {status}: {outcome}")

def start():
    devices = [Device(name=name, threads=1) for name in "ab"]
    with ShardedModel.from_pretrained(path, devices=devices, plan="even", progress=False) as model:
        return f"{model.generate(torch.tensor([[1, 5]]), max_new_tokens=2, eos_token_id=None).shape[1]} tokens"

def add():
    with ll.Cluster([ll.Device(name="a", threads=1)]) as cluster:
        cluster.wait()
        outcomes = []
        for number in json.loads(os.environ["TO_ADD"]):
            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            leave_descriptors(number)
            try:
                cluster.add(ll.Device(name=f"late-{number}", threads=1))
            except ll.ResourceError as error:
                outcomes.append(str(error))
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        return "; ".join([*outcomes, f"{len(cluster.workers())} workers"])

def leave_descriptors(number):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) - 1 + number, hard))

def leave_tasks(number):
    if group := os.environ["GROUP"]:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
        Path(group, "pids.max").write_text(str(1 + number))
    else:
        mine = [each for each in os.listdir("/proc") if each.isdigit() and os.stat(f"/proc/{each}").st_uid == os.getuid()]
        num_used = sum(len(os.listdir(f"/proc/{each}/task")) for each in mine)
        resource.setrlimit(resource.RLIMIT_NPROC, (num_used + number,) * 2)

"""


def outcomes(script: Script, numbers: range) -> list[int]:
    """Read what came of starting with so many of something left; return the numbers with which it worked."""
    worked = []
    for number in numbers:
        outcome = script.hear()
        if outcome == "4 tokens":
            worked.append(number)
        else:
            assert re.match(REFUSED, outcome), (number, outcome)
    return worked


REFUSED = (
    r"ResourceError: (\d+ file descriptors are needed and \d+ of \d+ are free: .*`ulimit -n \d+`"
    r"|\d+ more threads and processes are needed and only \d+ can be started \(.*(ulimit -u|pids\.max).* is \d+.*raise)"
)


def test_too_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are free, it is refused by name, also where a device is added; with as many as it says it works."""
    monkeypatch.setenv("TO_ADD", "[0, 1, 2, 3, 4, 5, 6, 7, 8]")
    code = "for number in range(47): attempt(leave_descriptors, number, start)\nattempt(lambda _: None, 0, add)"
    with Script(BEGIN + code, tmp_path) as script:
        assert outcomes(script, range(47)) == [46]
        assert re.fullmatch(r"(8 file descriptors are needed and \d of [^;]*; ){8}2 workers", script.hear())


@pytest.fixture
def process_group() -> Iterator[str]:
    """A control group that may be given a limit of processes; none is needed where the user's own limit counts."""
    if os.getuid() != 0:
        yield ""
        return
    group = Path("/sys/fs/cgroup/pids", f"lingualinked-test-{uuid.uuid4().hex}")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("root has no limit of processes, and there is no control group for one")
    yield str(group)
    with contextlib.suppress(OSError):
        group.rmdir()


def test_too_few_threads_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: str) -> None:
    """However few may start, it is refused by name; with as many as it says it works."""
    monkeypatch.setenv("GROUP", process_group)
    code = "for number in range(25): attempt(leave_tasks, number, start)"
    with Script(BEGIN + code, tmp_path) as script:
        assert outcomes(script, range(25)) == [24]
        assert script.end() == 0


NO_FOLDER = """
import json, os, tempfile
import lingualinked as ll
from lingualinked.transport.sockets import socket_folder

os.mkdir("f" * 120)
os.environ["XDG_RUNTIME_DIR"] = os.environ["TMPDIR"] = os.path.abspath("f" * 120)
folder = socket_folder.make_socket_folder()
os.rmdir(folder)
print(json.dumps(folder), flush=True)
tempfile._candidate_tempdir_list = lambda: ["/no/such/folder"]
tempfile.tempdir = None
socket_folder._LAST_RESORT = "/no/such/folder"
for forks in (True, False):
    try:
        ll.Cluster(1, _forks=forks)
    except ll.ResourceError as error:
        print(json.dumps(str(error)), flush=True)
"""


def test_no_folder_for_sockets(tmp_path: Path) -> None:
    with Script(NO_FOLDER, tmp_path, cwd=tmp_path) as script:
        assert script.hear().startswith("/tmp/lingualinked-")  # all others are too long
        for _ in range(2):
            error = script.hear()
            assert "is too long for the address of a socket" in error
            assert "'/no/such/folder': No such file or directory" in error
            assert "set TMPDIR to a short path" in error

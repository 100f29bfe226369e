"""What other users of the machine, and other processes of a cluster, can't reach: sockets and keys."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq
from transformers import PreTrainedModel
from zmq.utils import z85

import lingualinked as ll
from processes import Script, fork_server
from waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="other users and /proc are Linux's here"),
]

IDS = torch.tensor([[1, 17, 93, 54, 8]])

ATTACK = """
import os, socket, sys
os.setgroups([])
os.setuid(65534)
refusals = set()
for address in sys.argv[1:]:
    for _ in range(1100):
        attacker = socket.socket(socket.AF_UNIX)
        try:
            attacker.connect(address.replace("@", chr(0), 1))
        except OSError as error:
            refusals.add(type(error).__name__)
        else:
            refusals.add("connected")
print(*refusals)
"""


def socket_paths(cluster: ll.Cluster) -> list[Path]:
    addresses = [cluster._engine._mailbox.address, *cluster._engine._exchange.addresses.values()]
    return [Path(address.removeprefix("ipc://")) for address in addresses]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be another user")
def test_another_user_can_not_reach_a_socket(
    shared_cluster: ll.Cluster, sharded: Any, unsharded: PreTrainedModel
) -> None:
    """1,100 connections to each inbox would use up its process's descriptors, on which libzmq aborts."""
    shared_cluster.wait()
    paths = [str(path) for path in socket_paths(shared_cluster)]
    for path in paths:  # else it would be pytest's own folder that keeps strangers out
        assert any(stat.S_IMODE(parent.stat().st_mode) == 0o700 for parent in list(Path(path).parents)[:2])
    past = sharded(IDS).past_key_values
    attack = subprocess.run([sys.executable, "-c", ATTACK, *paths], capture_output=True, text=True, check=True)
    assert attack.stdout.split() == ["PermissionError"]
    assert sharded(IDS[:, :1], past_key_values=past).logits.shape == (1, 1, 128)
    expected = unsharded.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(sharded.generate(IDS, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("forks", [True, False])
def test_sockets_lie_in_the_runtime_folder_while_the_cluster_lives(
    forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        with ll.Cluster(1, _forks=forks) as cluster:
            cluster.wait()
            for path in socket_paths(cluster):
                assert path.is_socket()
                assert str(path).startswith(f"{runtime}/lingualinked-")
                assert len(str(path)) <= 107
                assert stat.S_IMODE(Path(runtime, path.relative_to(runtime).parts[0]).stat().st_mode) == 0o700
        assert list(Path(runtime).iterdir()) == []


Z85 = rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]"


def writable_memory(pid: int) -> Iterator[bytes]:
    """The contents of a process's writable memory, one mapping after the other."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions = line.split()[:2]
            start, end = (int(each, 16) for each in span.split("-"))
            if permissions.startswith("rw"):
                with contextlib.suppress(OSError):
                    memory.seek(start)
                    yield memory.read(end - start)


def secret_of(pid: int, public: str) -> str:
    """Find the secret key of a public one in its process's memory, where Python keeps the length of a text before it."""
    for content in writable_memory(pid):
        for match in re.finditer(rb"(?s)\x28\0{7}.{16}(?:.{8})?(" + Z85 + rb"{40})\0", content):
            if zmq.curve_public(match[1]).decode() == public:
                return match[1].decode()
    raise AssertionError(f"process {pid} does not hold the secret key of {public}")


KEEP_A_CLUSTER = """
import json, os, sys
import lingualinked as ll

with ll.Cluster(2) as cluster:
    cluster.add(ll.Device(name="late", threads=1))
    server = cluster._workers.launcher._starter.server.process.pid
    pids = {**cluster.pids, "caller": os.getpid(), "fork server": server}
    print(json.dumps([pids, {"caller": cluster._engine._mailbox.public_key, **cluster._engine._exchange.public_keys}]), flush=True)
    sys.stdin.read()
"""


def test_each_secret_key_is_in_one_process_alone(tmp_path: Path) -> None:
    """Neither the caller, nor the fork server, nor another worker holds a party's secret, as text or raw."""
    with Script(KEEP_A_CLUSTER, tmp_path) as script:
        pids, keys = script.hear()
        secrets = {name: secret_of(pids[name], public) for name, public in keys.items()}
        patterns = {f"{name} as text": secret.encode() for name, secret in secrets.items()}
        patterns |= {f"{name} raw": z85.decode(secret) for name, secret in secrets.items()}
        for name, pid in pids.items():
            held = {each for content in writable_memory(pid) for each in patterns if patterns[each] in content}
            assert held <= {f"{name} as text", f"{name} raw"}
        assert script.end() == 0


# --- one fork server for all


def test_clusters_share_a_fork_server_that_ends_with_the_last(own_fork_server: None) -> None:
    with ll.Cluster(1) as first:
        server = fork_server(first)
        with ll.Cluster(2) as second:
            assert fork_server(second) == server
            second.wait()
        first.wait()
        assert server.is_running()
        with ll.Cluster(1) as third:
            third.wait()
            folder = Path(third._workers.socket_folder).parent
            workers = [psutil.Process(pid) for pid in third.pids.values()]
            first.close()
            assert server.is_running()
            assert third.workers()[0].pid == workers[0].pid
    assert not server.is_running()
    assert not folder.exists()


def test_another_environment_takes_another_fork_server(own_fork_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with ll.Cluster(1) as first:
        monkeypatch.setenv("LINGUALINKED_TEST_WISH", "yes")
        with ll.Cluster(1) as second:
            assert fork_server(first) != fork_server(second)
            assert psutil.Process(second.pids["worker-0"]).environ()["LINGUALINKED_TEST_WISH"] == "yes"


def test_a_cluster_that_closes_while_a_shared_server_imports_leaves_nothing(own_fork_server: None) -> None:
    with ll.Cluster(1) as first:
        second = ll.Cluster(3)
        second.close()
        first.wait()
        assert len(fork_server(first).children()) == 1


def test_a_stopped_worker_of_one_of_two_clusters_ends(own_fork_server: None) -> None:
    with ll.Cluster(1) as first:
        with ll.Cluster(1) as second:
            worker = psutil.Process(second.pids["worker-0"])
            worker.suspend()
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        wait_until(lambda: len(fork_server(first).children()) == 1)
        assert len(first.pids) == 1

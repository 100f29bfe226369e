"""Daemons with disks of their own send each other what one of them lacks, whatever becomes of them meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from daemons import DaemonProcess, running_daemons
from families import reference, save_several_parts
from lingualinked.model.weight_files.byte_ranges import ByteRange
from lingualinked.model.weight_files.held_files import WholeFiles
from remote_workers import Traffic, hide_files, traffic

pytestmark = pytest.mark.process
__all__ = ["traffic"]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
Start = Callable[..., DaemonProcess]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_several_parts(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    return generate(reference(checkpoint))


@pytest.fixture
def start(shared_fork_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a daemon with a cache folder of its own, which does not find the caller's files by their path."""
    hide_files(monkeypatch)
    with running_daemons(tmp_path) as daemons:

        def start(cache: Path | str, *arguments: str) -> DaemonProcess:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
            return daemons.start(*arguments)

        yield start


def generate(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return tokens


def run(cluster: ll.Cluster, checkpoint: Path, device: str) -> torch.Tensor:
    plan = ll.Plan.from_spans([(device, 0, 6)])
    with ll.ShardedModel.from_pretrained(str(checkpoint), cluster=cluster, plan=plan, progress=False) as model:
        return generate(model)


def weight_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def call_before_reading(monkeypatch: pytest.MonkeyPatch, num_parts: int, call: Callable[[], object]) -> threading.Event:
    """Call something before the caller reads one more part than so many."""
    read, count, called = WholeFiles.read, iter(range(1 << 30)), threading.Event()

    def counted_read(files: WholeFiles, part: ByteRange) -> bytes:
        if next(count) == num_parts:
            called.set()
            call()
        return read(files, part)

    monkeypatch.setattr(WholeFiles, "read", counted_read)
    return called


def test_a_daemon_that_is_killed_meanwhile_is_replaced(
    start: Start, checkpoint: Path, expected: torch.Tensor, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = start("first"), start("second")
    with ll.Cluster([first.device("a"), second.device("b")]) as cluster:
        assert torch.equal(run(cluster, checkpoint, "a"), expected)
        assert weight_bytes(checkpoint) <= traffic.num_bytes <= 1.02 * weight_bytes(checkpoint)
        killed = call_before_reading(monkeypatch, 0, first.process.kill)
        assert torch.equal(run(cluster, checkpoint, "b"), expected)
        assert traffic.num_messages["ShareFiles"] == 1
        assert killed.is_set()


def test_what_had_come_before_its_worker_was_ended_is_not_sent_again(
    start: Start, checkpoint: Path, expected: torch.Tensor, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start("cache")
    with monkeypatch.context() as patch, ll.Cluster([daemon.device("a")]) as cluster:
        pid = cluster.pids["a"]
        call_before_reading(patch, 9, lambda: time.sleep(2.1))  # after 2 s it records what has come, with the next part
        call_before_reading(patch, 14, lambda: os.kill(pid, signal.SIGKILL))
        with pytest.raises(ll.WorkerDiedError, match="'a'"):
            run(cluster, checkpoint, "a")
    daemon.wait_until_idle()
    traffic.clear()
    with ll.Cluster([daemon.device("a")]) as cluster:
        assert torch.equal(run(cluster, checkpoint, "a"), expected)
    assert traffic.num_bytes < weight_bytes(checkpoint) - (4 << 20)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_disk_is_named(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True)
    try:
        daemon = start("full")
        with ll.Cluster([daemon.device("a")]) as cluster:
            with pytest.raises(ll.ResourceError, match=rf"device 'a'.*{folder}"):
                run(cluster, checkpoint, "a")
            assert cluster.workers()
        daemon.wait_until_idle()
    finally:
        subprocess.run(["umount", str(folder)], check=True)

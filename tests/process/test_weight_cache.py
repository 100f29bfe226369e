"""Several processes fill one cache, and are killed while they write: no part is claimed that is not whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from lingualinked.errors import ResourceError
from lingualinked.model.weight_files.byte_ranges import PART_BYTES, ByteRange, num_bytes_of, subtract_ranges
from lingualinked.model.weight_files.weight_cache import WeightCache
from remote_workers import remote_cluster
from weight_fetching import CONTENT, SIZE, byte_block

WHOLE = (ByteRange(0, 0, SIZE),)


@contextlib.contextmanager
def filler(folder: Path, pause_s: float, *, max_bytes: int = 4 * SIZE) -> Iterator[subprocess.Popen[str]]:
    """Run a process that fills the cache, with a pause after each part; it says when it begins and what it fetched."""
    code = f"import weight_fetching; weight_fetching.fill({str(folder)!r}, {pause_s}, {max_bytes})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "fetching\n"
        yield process


def fetched(process: subprocess.Popen[str]) -> int:
    """Return the bytes that a process has fetched, once it has ended."""
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return int(json.loads(out))


def held(folder: Path) -> tuple[ByteRange, ...]:
    """Return what is on record, all of which is read and compared."""
    with contextlib.closing(WeightCache(folder).open_file(CONTENT, "model")) as file:
        ranges = file.held(0)
        for each in ranges:
            data = bytearray(each.num_bytes)
            file.read_into(each.start, memoryview(data))
            assert data == byte_block(each.start, each.stop)
        return ranges


def wait_for_parts(folder: Path, num_bytes: int) -> None:
    """Wait until the record has so many bytes."""
    data = folder / CONTENT.fingerprint / "parts"
    deadline = time.monotonic() + 30
    while not data.exists() or data.stat().st_size < num_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_process_killed_while_it_writes_has_claimed_nothing_that_is_not_whole(tmp_path: Path) -> None:
    for num_records in (1, 100, 500, 1000, 1500):
        with filler(tmp_path, 0.0001) as process:
            wait_for_parts(tmp_path, 32 * num_records)
            process.send_signal(signal.SIGKILL)
        before = num_bytes_of(held(tmp_path))
        assert 0 < before < SIZE
    with filler(tmp_path, 0) as process:
        assert fetched(process) == SIZE - before  # resumed where the last one was killed
    assert held(tmp_path) == WHOLE


def test_two_processes_fetch_nothing_twice(tmp_path: Path) -> None:
    with filler(tmp_path, 0.0005) as first, filler(tmp_path, 0.0005) as second:
        shares = [fetched(first), fetched(second)]
    assert sum(shares) == SIZE
    assert held(tmp_path) == WHOLE


def test_what_a_killed_process_had_claimed_is_fetched_by_another(tmp_path: Path) -> None:
    with filler(tmp_path, 30) as hanging, filler(tmp_path, 0) as other:
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
        assert subtract_ranges(WHOLE, held(tmp_path)) != ()
        hanging.kill()
        assert fetched(other) == SIZE
    assert held(tmp_path) == WHOLE


def test_what_another_process_fills_is_not_removed_until_it_dies(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, max_bytes=SIZE + PART_BYTES)
    with filler(tmp_path, 30, max_bytes=cache.max_bytes) as process:
        other = dataclasses.replace(CONTENT, fingerprint="f" * 32)
        with contextlib.closing(cache.open_file(other, "other")) as file:
            with pytest.raises(ResourceError, match="in use"):
                cache.reserve([(file, WHOLE)])
            process.kill()
            process.wait()
            cache.reserve([(file, WHOLE)])
    assert [entry.model for entry in cache.entries()] == ["other"]


def test_a_disk_that_is_full_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    code = f"""
import shutil, weight_fetching
try:
    weight_fetching.fill({str(tmp_path)!r}, 0, {4 * SIZE})
except Exception as error:
    print(type(error).__name__, error)
print(shutil.disk_usage({str(tmp_path)!r}).used)
"""
    mount = f"mount -t tmpfs -o size=8m none {tmp_path} && exec {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this user may not mount a small disk: {done.stderr}")
    error, used = done.stdout.splitlines()
    assert re.fullmatch(
        rf"ResourceError the disk of {tmp_path} on host '.*' is full: 19.1 MiB of weights are to be kept there and "
        r"8.0 MiB are free, 11.1 MiB too few: free disk space, .*",
        error,
    )
    assert int(used) < 100_000


@pytest.mark.process
@pytest.mark.parametrize(
    ("cache_bytes", "error"), [(0, None), (40_000, r"^device 'a': the cache of weights in .* may take up 39.1 KiB")]
)
def test_a_worker_needs_room_in_its_cache_or_none(
    cache_bytes: int,
    error: str | None,
    tiny_llama: str,
    unsharded: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = [ll.Device(name="a", threads=1)]
    with remote_cluster(devices, tmp_path, monkeypatch, cache_bytes=cache_bytes) as cluster:
        if error is not None:
            with pytest.raises(ll.ResourceError, match=error):
                ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, progress=False)
            return
        with ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, progress=False) as model:
            ids = torch.tensor([[1, 17, 93]])
            assert torch.equal(model(ids).logits, unsharded(ids).logits)
    assert list(tmp_path.iterdir()) == []

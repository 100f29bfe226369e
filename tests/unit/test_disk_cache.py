"""What is kept between runs is one user's alone, whole or not at all, and no start fails where nothing can be kept."""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lingualinked.disk_cache import read_cached, write_cached
from lingualinked.whole_file import write_whole_file


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file get any bytes, as on a disk that is full; no fixture, or a report that is written to a file would end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lingualinked"


def test_cached_files_are_this_users_alone(cache: Path) -> None:
    cache.mkdir(mode=0o755)  # as earlier versions made it
    write_cached("name", "text")
    assert read_cached("name") == b"text"
    assert stat.S_IMODE((cache / "name").stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_full_disk_leaves_nothing_and_harms_nothing(cache: Path) -> None:
    write_cached("old", "text")
    with full_disk():
        for name in ("old", "new"):
            write_cached(name, "longer text")
            with pytest.raises(OSError, match="File too large"):
                write_whole_file(cache / name, "longer text")
    assert [path.name for path in cache.iterdir()] == ["old"]
    assert read_cached("old") == b"text"


def test_threads_that_write_the_same_file_at_once(cache: Path) -> None:
    texts = [str(index) * 200_000 for index in range(8)]
    threads = [threading.Thread(target=write_cached, args=("name", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (read_cached("name") or b"").decode() in texts
    assert len(list(cache.iterdir())) == 1


def test_a_file_that_a_user_saves_has_the_usual_permissions(tmp_path: Path) -> None:
    write_whole_file(tmp_path / "ours", "text")
    (tmp_path / "usual").write_text("text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("home", [None, "/proc/no-home", "relative"])
def test_where_there_is_no_folder_nothing_is_kept(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", home)  # to be ignored, as the specification of the name says
    elif home is not None:
        monkeypatch.setenv("HOME", home)
    write_cached("name", "text")
    assert read_cached("name") is None
    assert not os.path.lexists("relative")

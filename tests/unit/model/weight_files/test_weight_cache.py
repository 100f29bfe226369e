"""The cache stays within its bound, forgets what was not used for longest, and names what is too small."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from lingualinked.errors import CheckpointError, ResourceError
from lingualinked.model.spec import FileContent
from lingualinked.model.weight_files import weight_cache
from lingualinked.model.weight_files.byte_ranges import PART_BYTES, ByteRange
from lingualinked.model.weight_files.cached_file import CachedFile
from lingualinked.model.weight_files.weight_cache import WeightCache, default_cache_folder

SIZE = 2 * PART_BYTES
ALL = (ByteRange(0, 0, SIZE),)


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache", max_bytes=2 * SIZE + PART_BYTES)


def content(number: int, num_bytes: int = SIZE) -> FileContent:
    name = f"{number:032x}"
    return FileContent(
        name=f"{number}.safetensors", num_bytes=num_bytes, header_bytes=9, header_digest="", fingerprint=name
    )


def fill(cache: WeightCache, number: int) -> None:
    """Put a whole file into the cache, used at the second of its number."""
    with contextlib.closing(cache.open_file(content(number), f"model {number}")) as file:
        cache.reserve([(file, ALL)])
        file.write(0, bytes(SIZE))
        file.commit()
    os.utime(cache.folder / content(number).fingerprint / "lock", (number, number))


def numbers(cache: WeightCache) -> list[int]:
    return [int(entry.folder, 16) for entry in cache.entries()]


def test_files_are_listed_with_the_last_used_first(cache: WeightCache) -> None:
    fill(cache, 1)
    fill(cache, 2)
    first, second = cache.entries()
    assert (first.model, first.name, first.num_bytes, first.held_bytes) == ("model 2", "2.safetensors", SIZE, SIZE)
    assert (second.model, second.last_used_s) == ("model 1", 1.0)
    assert SIZE <= first.disk_bytes < SIZE + PART_BYTES
    assert cache.disk_bytes() == first.disk_bytes + second.disk_bytes


def test_what_was_not_used_for_longest_goes_first(cache: WeightCache) -> None:
    for number in (3, 1, 2):
        fill(cache, number)
    assert numbers(cache) == [3, 2]
    with contextlib.closing(cache.open_file(content(2), "")) as file:
        assert file.held(0) == ALL
    assert cache.disk_bytes() <= cache.max_bytes


def test_what_is_in_use_stays(cache: WeightCache) -> None:
    fill(cache, 1)
    with contextlib.closing(cache.open_file(content(1), "")):
        fill(cache, 2)
        fill(cache, 3)
        assert sorted(numbers(cache)) == [1, 3]
        with contextlib.closing(cache.open_file(content(3), "")), pytest.raises(ResourceError, match="in use: raise"):
            fill(cache, 4)
        assert cache.disk_bytes() <= cache.max_bytes
        assert cache.clear() > 0
        assert numbers(cache) == [1]
    assert cache.clear() >= SIZE
    assert cache.disk_bytes() == 0


def test_opening_a_file_counts_as_using_it(cache: WeightCache) -> None:
    fill(cache, 1)
    fill(cache, 2)
    cache.open_file(content(1), "").close()
    fill(cache, 3)
    assert sorted(numbers(cache)) == [1, 3]


def test_a_partial_file_needs_its_parts_alone(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", max_bytes=SIZE)
    large = content(1, num_bytes=1000 * SIZE)
    with contextlib.closing(cache.open_file(large, "")) as file:
        cache.reserve([(file, [ByteRange(0, 100 * SIZE, 100 * SIZE + PART_BYTES)])])
        assert PART_BYTES <= cache.disk_bytes() <= SIZE


def test_what_a_killed_process_had_reserved_is_not_reserved_twice(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", max_bytes=SIZE + 16384)
    for _ in range(3):
        with contextlib.closing(cache.open_file(content(1), "")) as file:
            cache.reserve([(file, ALL)])
    fill(cache, 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_after_all_that_is_unused_was_removed(
    number: int, cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, 1)
    fill(cache, 2)

    def fail(_file: CachedFile, _ranges: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(CachedFile, "reserve", fail)
    with pytest.raises(
        ResourceError, match=r"the disk of .*/cache on host .* is full: 2.0 MiB of weights .* too few: free"
    ):
        fill(cache, 3)
    assert [entry.held_bytes for entry in cache.entries()] == [0]
    monkeypatch.undo()
    fill(cache, 3)


def test_a_disk_that_becomes_full_leaves_nothing_on_record(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.closing(cache.open_file(content(1), "")) as file:
        file.write(0, bytes(SIZE))
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(ResourceError, match="is full"), cache.disk_errors(SIZE):
            file.commit()
        monkeypatch.undo()
        file.commit()
        assert file.held(0) == ()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = WeightCache(tmp_path / "file" / "cache")
    with pytest.raises(ResourceError, match=r"can't be kept in .*/file/cache on host .* set XDG_CACHE_HOME"):
        cache.open_file(content(1), "")
    assert cache.find_file(content(1)) is None
    assert cache.entries() == []


@pytest.mark.parametrize("name", ["../../../etc/passwd", "", "A" * 32, "0" * 31, "0" * 31 + "/"])
def test_a_fingerprint_is_not_a_path(name: str, cache: WeightCache) -> None:
    forged = FileContent(name="x", num_bytes=9, header_bytes=9, header_digest="", fingerprint=name)
    for use in (lambda: cache.open_file(forged, ""), lambda: cache.find_file(forged)):
        with pytest.raises(CheckpointError, match="is not the fingerprint of a file"):
            use()
    assert not cache.folder.exists()


def test_what_a_killed_process_left_to_remove_is_removed(cache: WeightCache) -> None:
    fill(cache, 1)
    left = cache.folder / "removed-0123"
    left.mkdir()
    (left / "data").write_bytes(bytes(10))
    fill(cache, 2)
    assert not left.exists()


def test_a_damaged_description_is_not_listed(cache: WeightCache) -> None:
    fill(cache, 1)
    (cache.folder / content(1).fingerprint / "about.json").write_text("{")
    assert cache.entries() == []
    cache.clear()
    assert cache.disk_bytes() == 0


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default_cache_folder() == Path("/some/where/lingualinked/weights")


def test_what_one_owner_has_fetched_is_not_given_to_another(cache: WeightCache) -> None:
    first, second = (WeightCache(cache.folder, cache.max_bytes, owner) for owner in ("first", "second"))
    with contextlib.closing(first.open_file(content(1), "model")) as file:
        first.reserve([(file, ALL)])
        file.write(0, bytes(SIZE))
        file.commit()
    assert second.find_file(content(1)) is None
    assert cache.find_file(content(1)) is None
    found = first.find_file(content(1))
    assert found is not None
    found.close()
    assert [entry.held_bytes for entry in cache.entries()] == [SIZE]  # all owners share the space


def test_a_file_that_could_not_be_begun_is_in_nobodys_use(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(weight_cache, "write_whole_file", fail)
        with pytest.raises(ResourceError, match="full"):
            cache.open_file(content(1), "model 1")
    cache.clear()
    assert not (cache.folder / content(1).fingerprint).exists()

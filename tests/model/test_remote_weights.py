"""A worker on another host than its caller loads the caller's weights: from a copy, from its cache, or fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversations import spec_of
from families import save_tiny
from lingualinked.errors import CheckpointError, ResourceError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.byte_ranges import PART_BYTES, ByteRange, cut_ranges, num_bytes_of, subtract_ranges
from lingualinked.model.weight_files.describing import describe_contents
from lingualinked.model.weight_files.fetching import DeliverPart, FetchError
from lingualinked.model.weight_files.held_files import WholeFiles
from lingualinked.model.weight_files.span_ranges import ranges_of_span
from lingualinked.model.weight_files.storage import WeightStorage
from lingualinked.model.weight_files.weight_cache import WeightCache
from lingualinked.model.weights.checkpoint import resolve_files
from lingualinked.model.weights.span_loading import LoadedSpan, load_span
from lingualinked.model.weights.weight_sources import CheckpointWeights

SPANS = [(0, 1), (1, 3), (3, 4), (0, 4)]


class Caller:
    """The caller's files, which lie where no worker looks, and how many bytes of them were sent."""

    def __init__(self, spec: ModelSpec, part_bytes: int = 1 << 20) -> None:
        self.spec = spec
        self.part_bytes = part_bytes
        self.sent: list[ByteRange] = []
        self.left_parts = -1  # before the connection breaks; never, if negative

    def fetch(self, ranges: Sequence[ByteRange], deliver: DeliverPart) -> None:
        with contextlib.closing(WholeFiles(self.spec.files)) as files:
            for part in cut_ranges(ranges, self.part_bytes):
                if not self.left_parts:
                    raise FetchError("the connection broke")
                self.left_parts -= 1
                self.sent.append(part)
                deliver(part, files.read(part))

    def check_cancelled(self) -> None:
        pass

    @property
    def sent_bytes(self) -> int:
        return num_bytes_of(self.sent)


def remote(spec: ModelSpec, *, verify: bool = False) -> ModelSpec:
    """Specify a model for a host where its files lie at no path that the caller knows."""
    described = describe_contents(spec, verify=verify)
    away = tuple(dataclasses.replace(each, path=f"/nowhere/tiny/{Path(each.path).name}") for each in spec.files)
    return dataclasses.replace(described, files=away)


def load(spec: ModelSpec, storage: WeightStorage, caller: Caller, start: int = 0, end: int = 4) -> LoadedSpan:
    return load_span(spec, start, end, open_files=lambda spec: storage.open_weights(spec, caller))


def assert_equal(ours: LoadedSpan, theirs: LoadedSpan) -> None:
    expected = theirs.model.state_dict()
    assert ours.model.state_dict().keys() == expected.keys()
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def tiny(tmp_path: Path) -> ModelSpec:
    return spec_of(save_tiny("llama", torch.float32, tmp_path / "tiny", max_shard_size="20KB"))


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("family", "max_shard_size"), [("llama-tied", "20KB"), ("gpt2", "1GB"), ("mixtral", "20KB"), ("phi3", "1GB")]
)
def test_exactly_a_span_is_fetched_and_once(
    family: str, max_shard_size: str, tmp_path: Path, cache: WeightCache
) -> None:
    spec = spec_of(save_tiny(family, torch.float32, tmp_path / "tiny", max_shard_size=max_shard_size))
    storage = WeightStorage(cache=cache, hub=False)
    for start, end in SPANS:
        caller = Caller(spec, part_bytes=1000)
        with contextlib.closing(storage.open_held(remote(spec))) as held:
            before = held.held
        loaded = load(remote(spec), storage, caller, start, end)
        assert_equal(loaded, load_span(spec, start, end))
        assert subtract_ranges(ranges_of_span(spec, start, end), [*before, *caller.sent]) == ()
        assert subtract_ranges(caller.sent, ranges_of_span(spec, start, end)) == ()
        assert caller.sent_bytes == num_bytes_of(subtract_ranges(caller.sent, before))  # nothing twice
        again = Caller(spec)
        assert_equal(load(remote(spec), storage, again, start, end), loaded)
        assert again.sent == []


def test_without_a_cache_weights_are_fetched_into_memory(tiny: ModelSpec, tmp_path: Path) -> None:
    caller = Caller(tiny)
    assert_equal(load(remote(tiny), WeightStorage(hub=False), caller, 1, 3), load_span(tiny, 1, 3))
    assert caller.sent_bytes == num_bytes_of(ranges_of_span(tiny, 1, 3))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tiny"]


def test_a_broken_fetch_is_resumed(tiny: ModelSpec, cache: WeightCache) -> None:
    caller = Caller(tiny, part_bytes=1000)
    caller.left_parts = 60
    with pytest.raises(
        FetchError, match=r"^\S+weight and \d+ other tensors of tiny can't be fetched: the connection broke"
    ):
        load(remote(tiny), WeightStorage(cache=cache, hub=False), caller)
    caller.left_parts = -1
    assert_equal(load(remote(tiny), WeightStorage(cache=cache, hub=False), caller), load_span(tiny, 0, 4))
    assert caller.sent_bytes == num_bytes_of(ranges_of_span(tiny, 0, 4))


def test_what_nobody_sends_is_borrowed_from_those_that_run_the_model(tiny: ModelSpec, cache: WeightCache) -> None:
    caller, storage = Caller(tiny), WeightStorage(cache=cache, hub=False)
    caller.left_parts = 0
    loaded = load_span(
        remote(tiny),
        0,
        4,
        open_files=lambda spec: storage.open_weights(spec, caller),
        fallback=lambda _meta: CheckpointWeights(tiny.files),
    )
    assert_equal(loaded, load_span(tiny, 0, 4))


@pytest.mark.parametrize("place", ["tiny", "deep/er/renamed", "models--org--tiny/snapshots/0123"])
def test_a_copy_is_used_wherever_it_lies(place: str, tiny: ModelSpec, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(tmp_path / "tiny", models / place)
    caller = Caller(tiny)
    assert_equal(load(remote(tiny), WeightStorage(models, hub=False), caller), load_span(tiny, 0, 4))
    assert caller.sent == []


def test_of_a_copy_that_lacks_a_shard_the_others_are_used(tiny: ModelSpec, tmp_path: Path, cache: WeightCache) -> None:
    models = tmp_path / "models"
    shutil.copytree(tmp_path / "tiny", models / "tiny")
    (models / "tiny" / Path(tiny.files[1].path).name).unlink()
    caller = Caller(tiny)
    assert_equal(load(remote(tiny), WeightStorage(models, cache, hub=False), caller), load_span(tiny, 0, 4))
    assert {each.file for each in caller.sent} == {1}


def test_the_callers_own_path_is_used_if_hosts_share_a_disk(tiny: ModelSpec) -> None:
    caller = Caller(tiny)
    load(describe_contents(tiny), WeightStorage(hub=False), caller)
    assert caller.sent == []


def change(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_copy_that_differs_is_named_and_not_used(
    tiny: ModelSpec, tmp_path: Path, cache: WeightCache, caplog: pytest.LogCaptureFixture
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tmp_path / "tiny", models / "tiny")
    name = Path(tiny.files[0].path).name
    copy, header_bytes = (models / "tiny" / name).read_bytes(), describe_contents(tiny).contents[0].header_bytes
    (models / "tiny" / name).write_bytes(copy[:header_bytes] + bytes(len(copy) - header_bytes))
    caller = Caller(tiny)
    with caplog.at_level(logging.WARNING, "lingualinked"):
        assert_equal(load(remote(tiny), WeightStorage(models, cache, hub=False), caller), load_span(tiny, 0, 4))
    assert {each.file for each in caller.sent} == {0}
    assert f"{models}/tiny/{name} on host" in caplog.text
    assert "differs from the caller's in the values of its tensors" in caplog.text
    caller.left_parts = 0
    cache.clear()
    with pytest.raises(FetchError, match=r"the connection broke; nor can a copy on this host be used: .* values"):
        load(remote(tiny), WeightStorage(models, cache, hub=False), caller)


def test_a_copy_of_another_length_is_named_if_its_folder_is_called_alike(
    tiny: ModelSpec, tmp_path: Path, cache: WeightCache, caplog: pytest.LogCaptureFixture
) -> None:
    models, name = tmp_path / "models", Path(tiny.files[0].path).name
    for folder in ("tiny", "other"):
        (models / folder).mkdir(parents=True)
        (models / folder / name).write_bytes(b"short")
    with caplog.at_level(logging.WARNING, "lingualinked"):
        load(remote(tiny), WeightStorage(models, cache, hub=False), Caller(tiny))
    (record,) = caplog.records
    assert f"{models}/tiny/{name} on host" in record.getMessage()
    assert "has 5 bytes in place of the" in record.getMessage()


def test_a_copy_with_another_config_is_not_used(
    tiny: ModelSpec, tmp_path: Path, cache: WeightCache, caplog: pytest.LogCaptureFixture
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tmp_path / "tiny", models / "tiny")
    described = remote(tiny)
    (models / "tiny" / "config.json").write_text('{"model_type": "llama", "rope_theta": 3}')
    caller = Caller(tiny)
    with caplog.at_level(logging.WARNING, "lingualinked"):
        load(described, WeightStorage(models, cache, hub=False), caller)
    assert caller.sent
    assert "but the config.json beside it is not" in caplog.text


def test_verifying_finds_one_flipped_bit_anywhere_in_a_copy(tiny: ModelSpec, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(tmp_path / "tiny", models / "tiny")
    position = (
        describe_contents(tiny).contents[0].header_bytes
    )  # the beginning of a tensor, which no fingerprint covers
    change(models / "tiny" / Path(tiny.files[0].path).name, position)
    storage = WeightStorage(models, hub=False)
    load(remote(tiny), storage, Caller(tiny))
    with pytest.raises(CheckpointError, match=r"in .*/models/tiny/.* on host .* differs from the caller's: copy"):
        load(remote(tiny, verify=True), storage, Caller(tiny))


@pytest.mark.parametrize("verify", [False, True])
def test_what_a_disk_has_changed_in_the_cache_is_fetched_again(
    verify: bool, tiny: ModelSpec, cache: WeightCache, caplog: pytest.LogCaptureFixture
) -> None:
    spec, storage, caller = remote(tiny, verify=verify), WeightStorage(cache=cache, hub=False), Caller(tiny)
    load(spec, storage, caller)
    before = caller.sent_bytes
    content = spec.contents[0]
    for position in (3, content.header_bytes + 5):
        change_in_place(cache.folder / content.fingerprint / "data", position)
    with caplog.at_level(logging.WARNING, "lingualinked"):
        assert_equal(load(spec, storage, caller), load_span(tiny, 0, 4))
    assert before < caller.sent_bytes < before + content.num_bytes
    assert "the disk has changed cached bytes" in caplog.text


def change_in_place(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_verifying_replaces_what_another_caller_has_put_into_the_cache(tiny: ModelSpec, cache: WeightCache) -> None:
    class Liar(Caller):
        """Sends other values where the fingerprint has no sample."""

        def fetch(self, ranges: Sequence[ByteRange], deliver: DeliverPart) -> None:
            header = described.contents[0].header_bytes

            def lie(part: ByteRange, data: bytes | bytearray | memoryview) -> None:
                changed = bytearray(data)
                if part.file == 0 and part.start <= header < part.stop:
                    changed[header - part.start] ^= 1
                deliver(part, changed)

            super().fetch(ranges, lie)

    described = remote(tiny, verify=True)
    storage = WeightStorage(cache=cache, hub=False)
    load(remote(tiny), storage, Liar(tiny))
    caller = Caller(tiny)
    assert_equal(load(described, storage, caller), load_span(tiny, 0, 4))
    assert caller.sent
    cache.clear()
    with pytest.raises(CheckpointError, match=r"was fetched to host .* and differs from what the caller described"):
        load(described, storage, Liar(tiny))


def test_a_source_that_sends_another_header_is_refused(tiny: ModelSpec, tmp_path: Path, cache: WeightCache) -> None:
    other = spec_of(save_tiny("llama-tied", torch.float32, tmp_path / "other"))
    described = remote(tiny)
    longer = dataclasses.replace(tiny, files=other.files * len(tiny.files))
    with pytest.raises(
        CheckpointError, match=r"header of .* that was fetched is not the one that the caller described"
    ):
        load(described, WeightStorage(cache=cache, hub=False), Caller(longer))


def test_a_span_larger_than_the_cache_is_refused_by_name(tiny: ModelSpec, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", max_bytes=60_000)
    caller = Caller(tiny)
    with pytest.raises(
        ResourceError, match=r"the cache of weights in .*/cache on host .* may take up 58.6 KiB \(--cache-bytes\)"
    ):
        load(remote(tiny), WeightStorage(cache=cache, hub=False), caller)
    assert cache.disk_bytes() <= 60_000


def test_what_is_held_can_be_served_to_others(tiny: ModelSpec, tmp_path: Path, cache: WeightCache) -> None:
    models = tmp_path / "models"
    (models / "tiny").mkdir(parents=True)
    shutil.copy(tiny.files[0].path, models / "tiny")
    spec, storage = remote(tiny), WeightStorage(models, cache, hub=False)
    load(spec, storage, Caller(tiny), 1, 3)
    with contextlib.closing(storage.open_held(spec)) as held, contextlib.closing(WholeFiles(tiny.files)) as files:
        assert ByteRange(0, 0, spec.contents[0].num_bytes) in held.held
        assert subtract_ranges(ranges_of_span(tiny, 1, 3), held.held) == ()
        for part in cut_ranges(held.held, 1000):
            assert held.read(part) == files.read(part)
        lacking = subtract_ranges([ByteRange(i, 0, each.num_bytes) for i, each in enumerate(spec.contents)], held.held)
        with pytest.raises(CheckpointError, match="are not in the cache here"):
            held.read(lacking[0])
    assert {each.name for each in cache.folder.iterdir()} >= {each.fingerprint for each in spec.contents[1:]}


@pytest.mark.parametrize("has_cache", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_tensors_of_any_size_are_read_bit_by_bit(
    has_cache: bool, verify: bool, tmp_path: Path, cache: WeightCache
) -> None:
    tensors = {
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "odd": torch.arange(13, dtype=torch.int8),
        "large": torch.randn(700_000),  # crosses parts
        "larger": torch.randn(3, 400_001).to(torch.float16),
        **{f"{'name' * 60}.{number}": torch.full((1,), number) for number in range(6000)},  # a header of several parts
    }
    (tmp_path / "tiny").mkdir()
    save_file(tensors, tmp_path / "tiny" / "model.safetensors")
    spec = ModelSpec(
        class_name="",
        config_json="{}",
        dtype="float32",
        attn_implementation=None,
        load_format="safetensors",
        files=resolve_files(tmp_path / "tiny"),
    )
    described = remote(spec, verify=verify)
    assert described.contents[0].header_bytes > PART_BYTES
    names = ["empty", "larger", "scalar", "odd", f"{'name' * 60}.17"]
    for _ in range(2):
        caller = Caller(spec)
        source = WeightStorage(cache=cache if has_cache else None, hub=False).open_weights(described, caller)
        with contextlib.closing(source):
            source.prepare(names)
            fetched = caller.sent_bytes
            for name in names:
                assert torch.equal(source.read_tensor(name), tensors[name])
            if has_cache:
                assert caller.sent_bytes == fetched
                source.prepare(["large"])
                assert torch.equal(source.read_tensor("large"), tensors["large"])
    assert caller.sent == [] or not has_cache


def test_nothing_is_left_open(tiny: ModelSpec, cache: WeightCache) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    caller = Caller(tiny)
    caller.left_parts = 3
    with pytest.raises(FetchError):
        load(remote(tiny), WeightStorage(cache=cache, hub=False), caller)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    caller.left_parts = -1
    with contextlib.closing(WeightStorage(cache=cache, hub=False).open_weights(remote(tiny), caller)):
        assert len(list(Path("/proc/self/fd").iterdir())) == before + len(tiny.files)  # there may be hundreds
    assert cache.clear() >= 0
    assert cache.disk_bytes() == 0

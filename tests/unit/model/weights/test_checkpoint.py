import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from lingualinked.errors import ArgumentError, CheckpointError
from lingualinked.model.spec import CheckpointFile
from lingualinked.model.weights.checkpoint import resolve_dtype, resolve_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_weights(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    save_file({"counts": torch.arange(3), name.replace(".", "-"): torch.zeros(3, dtype=dtype)}, folder / name)


def write_index(folder: Path, names: object) -> None:
    weight_map = {str(index): name for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for name in SHARDS:
        write_weights(tmp_path, name)
    write_index(tmp_path, [*SHARDS, SHARDS[0]])
    return tmp_path


def paths(files: Iterable[CheckpointFile]) -> list[Path]:
    return [Path(file.path) for file in files]


def test_a_single_file(tmp_path: Path) -> None:
    write_weights(tmp_path, "model.safetensors")
    assert paths(resolve_files(tmp_path)) == [tmp_path / "model.safetensors"]


def test_the_files_of_an_index(sharded: Path) -> None:
    assert paths(resolve_files(sharded)) == [sharded / name for name in SHARDS]


def test_paths_are_absolute(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded.parent)
    assert all(path.is_absolute() for path in paths(resolve_files(sharded.name)))


def test_a_single_file_wins_over_an_index_as_in_transformers(sharded: Path) -> None:
    write_weights(sharded, "model.safetensors")
    assert paths(resolve_files(sharded)) == [sharded / "model.safetensors"]


def test_a_subfolder(sharded: Path) -> None:
    files = resolve_files(sharded.parent, subfolder=sharded.name)
    assert paths(files) == [sharded / name for name in SHARDS]


def test_a_model_in_the_local_cache_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123abc")
    for name in SHARDS:
        write_weights(snapshot, name)
    write_index(snapshot, SHARDS)
    files = resolve_files("some/model", cache_dir=tmp_path, local_files_only=True, revision="main", token=None)
    assert paths(files) == [snapshot / name for name in SHARDS]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}, a shard .* is missing"):
        resolve_files(sharded)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", 3])
def test_an_index_can_not_point_elsewhere(name: object, tmp_path: Path) -> None:
    write_index(tmp_path, [name])
    with pytest.raises(CheckpointError, match="outside its own folder"):
        resolve_files(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_a_malformed_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not an index of safetensors files"):
        resolve_files(tmp_path)


def write_nothing(folder: Path) -> None:
    pass


def write_pytorch(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("write", "remedy"),
    [
        (write_nothing, "neither model.safetensors nor model.safetensors.index.json"),
        (write_pytorch, "pytorch_model.bin, and only safetensors are read: .*save_pretrained"),
    ],
)
def test_other_folders_are_refused_with_the_remedy(write: Callable[[Path], None], remedy: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match=remedy):
        resolve_files(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "not/there", "a/b/c/d", "no-such-model"])
def test_what_is_not_there_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=path):
        resolve_files(path, cache_dir=tmp_path, local_files_only=True)


def test_a_dtype_that_is_asked_for_is_taken() -> None:
    assert resolve_dtype("float16", LlamaConfig(dtype="bfloat16"), ()) == "float16"
    assert resolve_dtype(torch.float64, LlamaConfig(), ()) == "float64"


@pytest.mark.parametrize("dtype", ["auto", None])
def test_auto_is_the_configs_dtype_then_the_checkpoints_then_torchs(dtype: str | None, tmp_path: Path) -> None:
    write_weights(tmp_path, "model.safetensors", torch.float16)
    files = resolve_files(tmp_path)
    assert resolve_dtype(dtype, LlamaConfig(dtype="bfloat16"), files) == "bfloat16"
    assert resolve_dtype(dtype, LlamaConfig(), files) == "float16"
    assert resolve_dtype(dtype, LlamaConfig(), ()) == "float32"


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, "nn", 3, {"": "float32"}])
def test_what_is_no_floating_dtype_is_refused(dtype: object) -> None:
    with pytest.raises(ArgumentError, match="is not a floating-point dtype of torch"):
        resolve_dtype(dtype, LlamaConfig(), ())

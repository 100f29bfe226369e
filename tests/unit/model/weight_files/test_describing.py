"""What is said of a file's content: equal for copies, and different as soon as a model was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lingualinked.errors import CheckpointError
from lingualinked.model.spec import FileContent, ModelSpec
from lingualinked.model.weight_files.describing import (
    describe_contents,
    describe_file,
    digest_config,
    digest_header,
    digest_tensor,
)
from lingualinked.model.weights.checkpoint import resolve_files
from lingualinked.model.weights.safetensors_file import identify_file


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, **tensors: torch.Tensor) -> FileContent:
    save_file(tensors, path)
    return describe_file(identify_file(str(path)))


def test_a_copy_has_the_same_fingerprint(tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", w=torch.arange(100.0), empty=torch.zeros(0), scalar=torch.tensor(1))
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    second = describe_file(identify_file(str(tmp_path / "b.safetensors")))
    assert (second.fingerprint, second.header_digest) == (first.fingerprint, first.header_digest)
    assert first.name == "a.safetensors"
    header = (tmp_path / "a.safetensors").read_bytes()[: first.header_bytes]
    assert digest_header(header) == first.header_digest


@pytest.mark.parametrize("name", ["w", "small", "scalar"])
def test_a_change_in_any_tensor_changes_the_fingerprint_alone(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.arange(1000.0), "small": torch.ones(3), "scalar": torch.tensor(1.0)}
    first = write(tmp_path / "a.safetensors", **tensors)
    second = write(tmp_path / "b.safetensors", **{**tensors, name: tensors[name] + 0.5})
    assert second.fingerprint != first.fingerprint
    assert second.header_digest == first.header_digest


def test_names_and_shapes_change_the_header_digest(tmp_path: Path) -> None:
    digests = {
        write(tmp_path / "a.safetensors", w=torch.zeros(8)).header_digest,
        write(tmp_path / "b.safetensors", v=torch.zeros(8)).header_digest,
        write(tmp_path / "c.safetensors", w=torch.zeros(2, 4)).header_digest,
    }
    assert len(digests) == 3


def test_every_tensor_is_hashed_on_request_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(100.0), "v": torch.zeros(0)}, path)
    file = identify_file(str(path))
    content = describe_file(file, verify=True)
    expected = {digest_tensor(torch.arange(100.0).numpy().tobytes()), digest_tensor(b"")}
    assert set(content.tensor_digests) == expected
    monkeypatch.setattr("lingualinked.model.weight_files.describing.SafetensorsFile", None)
    assert describe_file(file, verify=True) == content


def test_a_file_that_has_changed_is_not_described(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    file = identify_file(str(path))
    save_file({"w": torch.ones(4)}, path)
    with pytest.raises(CheckpointError, match="replaced or written to"):
        describe_file(file)


def test_a_specification_is_given_its_contents(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    spec = ModelSpec(
        class_name="LlamaForCausalLM",
        config_json="{}",
        dtype="float32",
        attn_implementation=None,
        load_format="safetensors",
        files=resolve_files(tmp_path),
    )
    described = describe_contents(spec)
    assert [each.name for each in described.contents] == ["model.safetensors"]
    assert described.config_digest == digest_config(tmp_path) != ""


def test_a_config_is_compared_by_its_values(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    configs = [
        json.dumps({"x": 1, "y": 2, "transformers_version": "5"}),
        json.dumps({"y": 2, "x": 1, "_name_or_path": "/somewhere"}, indent=2),
        json.dumps({"x": 1, "y": 3}),
    ]
    for folder, config in zip(folders, configs, strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    first, second, third = (digest_config(folder) for folder in folders)
    assert first == second != third
    assert digest_config(tmp_path) == ""
    (tmp_path / "config.json").write_text("{")
    assert digest_config(tmp_path) == ""

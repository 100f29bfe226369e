"""A caller on another host names paths of its own: what lies there is used if it is the caller's, and else not spoken of."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.describing import describe_file
from lingualinked.model.weight_files.local_copies import LocalCopies
from lingualinked.model.weights.safetensors_file import identify_file


def spec_of(path: Path) -> ModelSpec:
    """Describe a model of one file."""
    file = identify_file(str(path))
    return ModelSpec(
        class_name="LlamaForCausalLM",
        config_json="{}",
        dtype="float32",
        attn_implementation=None,
        load_format="safetensors",
        files=(file,),
        contents=(describe_file(file),),
    )


def test_a_path_of_the_caller_tells_nothing_of_another_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    save_file({"a": torch.zeros(4)}, path)
    spec = spec_of(path)
    assert LocalCopies(hub=False).find(spec) == ([spec.files[0]], [])
    for text in (b"short", b"password" + b"x" * (spec.files[0].num_bytes - 8)):  # its size, its first bytes
        path.write_bytes(text)
        assert LocalCopies(hub=False).find(spec) == ([None], [])


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    spec = spec_of(path)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    assert LocalCopies(tmp_path, hub=False).find(spec) == ([None], [])

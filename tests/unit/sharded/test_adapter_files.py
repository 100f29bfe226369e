"""An adapter is read as peft saves it; what can't be used is refused by name, before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lingualinked as ll
from lingualinked.model.cutting.parts import build_meta
from lingualinked.model.spec import ModelSpec
from lingualinked.sharded.adapters.adapter_files import open_adapter
from lingualinked.sharded.loading.arguments import LoadArguments

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
SPEC = ModelSpec(
    class_name="LlamaForCausalLM",
    config_json=CONFIG.to_json_string(use_diff=False),
    dtype="float32",
    attn_implementation=None,
    load_format="dummy",
    files=(),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model: Any = LlamaForCausalLM(CONFIG)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True, base_model_name_or_path="base")
    inject_adapter_in_model(config, model, "own")
    config.save_pretrained(str(tmp_path))
    tensors = get_peft_model_state_dict(model, adapter_name="own", save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_every_tensor_has_its_place(folder: Path) -> None:
    adapter = open_adapter(SPEC, "mine", str(folder))
    model: Any = build_meta(SPEC)
    inject_adapter_in_model(adapter.config, model, "mine")
    parameters = {name: each.shape for name, each in model.named_parameters() if ".mine" in name}
    assert {f"{path}.{inner}" for path, inner in adapter.places} == parameters.keys()
    for (path, inner), saved in adapter.places.items():
        assert adapter.tensors.read(saved).shape == parameters[f"{path}.{inner}"]
    assert not adapter.copies


def test_the_base_model_is_that_of_the_adapter(folder: Path) -> None:
    arguments = LoadArguments.of(str(folder), adapter_name="mine")
    assert (arguments.path, arguments.adapter, arguments.adapter_name) == ("base", str(folder), "mine")
    (folder / "config.json").write_text("{}")
    assert LoadArguments.of(folder).path == str(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all' of adapter"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' of .* changes the base model"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] of .*: whole modules are not replaced"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] of .*: only linear layers and embeddings"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters=.* of .*: only linear layers and embeddings"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* of .*: the plan has the layers of the base model"),
        ({"velora_config": {"num_groups": 2}}, "velora_config=.* of .*: only LoRA, rsLoRA and DoRA"),
    ],
)
def test_what_is_more_than_lora_is_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ll.UnsupportedOperationError, match=reason):
        open_adapter(SPEC, "mine", str(folder))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter at .*: there is no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not the configuration of an adapter"),
        (lambda folder: change_config(folder, r="many"), "does not fit LlamaForCausalLM|not a configuration of LoRA"),
        (lambda folder: change_config(folder, target_modules=["c_attn"]), "Target modules .*c_attn.* not found"),
        (lambda folder: change_config(folder, r=8), r"q_proj.lora_A.weight is \[4, 16\], and has to be \[8, 16\]"),
        (lambda folder: change_config(folder, target_modules=["q_proj"]), "lm_head.lora_.* belongs to no module"),
        (lambda folder: change_config(folder, target_modules=["q_proj", "k_proj"]), "k_proj.lora_A.weight is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345"), "truncated or not a safetensors"),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "adapter_model.bin, a pickle, which can run any code",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (
            lambda folder: change_tensors(folder, lambda tensors: tensors.update(more=torch.ones(1))),
            "more belongs to no module; it is of another model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, spoil: Callable[[Path], object], reason: str) -> None:
    spoil(folder)
    with pytest.raises(ll.CheckpointError, match=reason):
        open_adapter(SPEC, "mine", str(folder))


def test_weights_of_the_base_model_are_told_apart(folder: Path) -> None:
    name = "base_model.model.lm_head.base_layer.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(32, 16)}))
    assert open_adapter(SPEC, "mine", str(folder)).copies == ["lm_head.base_layer.weight"]


@pytest.mark.parametrize("base", [None, 3, ""])
def test_an_adapter_that_names_no_base_model(folder: Path, base: object) -> None:
    change_config(folder, base_model_name_or_path=base)
    with pytest.raises(ll.CheckpointError, match="names no base model: load the base model, and call load_adapter"):
        LoadArguments.of(folder)

"""A stage reads and holds only its own tensors, and a missing tensor raises an error that names it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from conversations import Cut, Whole, greedy, load_stages, spec_of
from families import reference, save_tiny, tiny_config, tiny_model
from lingualinked.errors import CheckpointError
from lingualinked.model.cutting.parts import build_meta, find_parts
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage
from lingualinked.model.weights.span_loading import check_weights
from lingualinked.model.weights.weight_sources import untied_parameters

NUM_LAYERS = 4
SPANS = [(0, 1), (1, 3), (3, 4), (0, 4)]

Checkpoint = Callable[..., Path]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the tensors of a checkpoint of one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def parameters(stage: Stage) -> dict[str, Tensor]:
    return dict(stage._model.named_parameters(remove_duplicate=False))


def dummy_spec(family: str, seed: int = 0) -> ModelSpec:
    config = tiny_config(family)
    return ModelSpec(
        class_name=type(tiny_model(family, torch.float32)).__name__,
        config_json=config.to_json_string(use_diff=False),
        dtype="bfloat16",
        attn_implementation=None,
        load_format="dummy",
        files=(),
        seed=seed,
    )


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "phi3"])
def test_a_stage_reads_its_own_tensors_alone(family: str, max_shard_size: str, tmp_path: Path) -> None:
    spec = spec_of(save_tiny(family, torch.float32, tmp_path, max_shard_size=max_shard_size))
    assert (len(spec.files) > 1) == (max_shard_size == "20KB")
    header_bytes = sum(8 + int.from_bytes(Path(file.path).read_bytes()[:8], "little") for file in spec.files)
    parts = find_parts(build_meta(spec))
    for start, end in SPANS:
        stage = Stage.load(spec, start, end)
        assert stage.weight_bytes == parts.span_bytes(start, end)
        assert stage.num_bytes_read == header_bytes + stage.weight_bytes


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gemma2", "falcon-40b"])
def test_weights_are_aligned(family: str, checkpoint: Checkpoint) -> None:
    stage = Stage.load(spec_of(checkpoint(family, torch.bfloat16)), 0, NUM_LAYERS)
    assert {parameter.data_ptr() % 64 for parameter in parameters(stage).values()} == {0}


def test_the_middle_holds_layers_alone(checkpoint: Checkpoint) -> None:
    names = parameters(Stage.load(spec_of(checkpoint("llama-tied")), 1, 3))
    assert {".".join(name.split(".")[:3]) for name in names} == {"model.layers.1", "model.layers.2"}


def test_a_stage_with_both_ends_holds_a_tied_embedding_once(checkpoint: Checkpoint) -> None:
    names = parameters(Stage.load(spec_of(checkpoint("llama-tied")), 0, NUM_LAYERS))
    assert names["lm_head.weight"] is names["model.embed_tokens.weight"]


def test_experts_are_fused_from_the_checkpoints_own_layout(checkpoint: Checkpoint) -> None:
    keys = load_file(checkpoint("mixtral") / "model.safetensors")
    assert "model.layers.2.block_sparse_moe.experts.3.w1.weight" in keys
    names = parameters(Stage.load(spec_of(checkpoint("mixtral")), 2, 3))
    assert names["model.layers.2.mlp.experts.gate_up_proj"].shape == (4, 96, 32)


def only_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def both_alike(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def both_different(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)


def no_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def unused_tensors(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.layers.9.self_attn.q_proj.weight"] = torch.ones(4)


@pytest.mark.parametrize("change", [only_head, both_alike, both_different, no_prefix, unused_tensors])
def test_what_transformers_makes_of_unusual_checkpoints(
    change: Callable[[dict[str, Tensor]], None], tmp_path: Path
) -> None:
    folder = rewrite(save_tiny("llama-tied", torch.float32, tmp_path), change)
    spec = spec_of(folder)
    check_weights(spec, build_meta(spec))
    said = greedy(Whole(reference(folder)), 3)
    for num_stages in (1, 3):
        ours = greedy(Cut(load_stages(spec, num_stages, NUM_LAYERS)), 3)
        assert all(torch.equal(left, right) for left, right in zip(ours, said, strict=True))


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "opt-350m", "bloom"])
def test_dummy_weights_are_the_same_however_the_model_is_cut(family: str) -> None:
    spec = dummy_spec(family)
    whole = Stage.load(spec, 0, NUM_LAYERS)
    for start, end in SPANS:
        stage = Stage.load(spec, start, end)
        assert stage.num_bytes_read == 0
        for name, parameter in parameters(stage).items():
            assert torch.equal(parameter, parameters(whole)[name]), name
    said = greedy(Cut([whole]), 3)
    ours = greedy(Cut(load_stages(spec, 3, NUM_LAYERS)), 3)
    assert all(torch.equal(left, right) and left.isfinite().all() for left, right in zip(ours, said, strict=True))


def test_dummy_weights_depend_on_seed_and_name() -> None:
    names = parameters(Stage.load(dummy_spec("llama", 1), 0, 2))
    others = parameters(Stage.load(dummy_spec("llama", 2), 0, 2))
    assert not any(torch.equal(names[name], others[name]) for name in names)
    assert not torch.equal(names["model.layers.0.mlp.up_proj.weight"], names["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_progress_comes_in_the_calling_thread_and_ends_at_the_weights(dtype: str, checkpoint: Checkpoint) -> None:
    told: list[int] = []
    threads: set[int] = set()

    def progress(num_bytes: int) -> None:
        told.append(num_bytes)
        threads.add(threading.get_ident())

    stage = Stage.load(spec_of(checkpoint("mixtral"), dtype=dtype), 1, 3, progress=progress)
    assert told == sorted(set(told))
    assert told[-1] == stage.weight_bytes
    assert threads == {threading.get_ident()}


def test_loading_is_silent_and_leaves_settings_alone(
    checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    spec = spec_of(checkpoint("llama"))
    before = transformers_logging.is_progress_bar_enabled(), dict(os.environ)
    capfd.readouterr()
    Stage.load(spec, 0, 2)
    assert (transformers_logging.is_progress_bar_enabled(), dict(os.environ)) == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def lacks_a_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.3.input_layernorm.weight"]


def lacks_its_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def lacks_an_expert(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]


def lacks_half_an_expert(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]


def has_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(7, 32)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", lacks_a_norm, "model.layers.3.input_layernorm.weight"),
        ("llama", lacks_its_head, "lm_head.weight"),
        ("llama", has_another_shape, r"model.layers.2.mlp.up_proj.weight \[7, 32\]"),
    ],
)
def test_tensors_that_are_missing_or_unfit_are_named(
    family: str, change: Callable[[dict[str, Tensor]], None], named: str, tmp_path: Path
) -> None:
    spec = spec_of(rewrite(save_tiny(family, torch.float32, tmp_path), change))
    with pytest.raises(CheckpointError, match=named):
        check_weights(spec, build_meta(spec))
    with pytest.raises(CheckpointError, match=named):
        Stage.load(spec, 0, 1)


@pytest.mark.parametrize(
    ("change", "named"), [(lacks_an_expert, "experts.down_proj"), (lacks_half_an_expert, "experts.gate_up_proj")]
)
def test_an_expert_that_is_missing_is_named(
    change: Callable[[dict[str, Tensor]], None], named: str, tmp_path: Path
) -> None:
    spec = spec_of(rewrite(save_tiny("mixtral", torch.float32, tmp_path), change))
    with pytest.raises(CheckpointError, match=named):
        Stage.load(spec, 1, 2)


def test_a_file_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    spec = spec_of(folder)
    for use in (lambda: check_weights(spec, build_meta(spec)), lambda: Stage.load(spec, 0, 1)):
        with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
            use()


def test_a_file_that_vanished_is_refused_by_name(tmp_path: Path) -> None:
    spec = spec_of(save_tiny("llama", torch.float32, tmp_path, max_shard_size="20KB"))
    Path(spec.files[1].path).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.* is missing"):
        Stage.load(spec, 0, 1)


class Lent:
    """The weights of a model that is loaded elsewhere."""

    def __init__(self, whole: PreTrainedModel, meta_model: PreTrainedModel) -> None:
        self._parameters = whole.state_dict()
        self.shapes = {name: tuple(each.shape) for name, each in untied_parameters(meta_model).items()}
        self.num_bytes_read = 0

    def prepare(self, names: Iterable[str]) -> None:
        pass

    def read_tensor(self, name: str) -> Tensor:
        return self._parameters[name].clone()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt2"])
def test_a_file_rewritten_while_it_is_read(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, torch.float32, tmp_path)
    spec, whole = spec_of(folder), reference(folder)
    expected = greedy(Whole(whole), 3)
    file = folder / "model.safetensors"

    def rewrite(_num_bytes: int) -> None:
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            opened.write(b"\x07")

    with pytest.raises(CheckpointError, match=r"model.safetensors has been replaced or written to"):
        Stage.load(spec, 0, 2, progress=rewrite)
    spec = spec_of(folder)
    stages = [
        Stage.load(spec, start, start + 2, progress=rewrite, fallback=lambda meta: Lent(whole, meta))
        for start in (0, 2)
    ]
    for ours, theirs in zip(greedy(Cut(stages), 3), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    spec = spec_of(save_tiny("llama", torch.float32, tmp_path))
    config = json.loads(spec.config_json) | {"num_hidden_layers": 6}
    deeper = dataclasses.replace(spec, config_json=json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks 18 tensors .* model.layers.4"):
        check_weights(deeper, build_meta(deeper))

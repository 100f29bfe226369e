"""Each undocumented name of transformers works as expected: a failure here shows what an upgrade broke."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, cache_utils, core_model_loading
from transformers.utils import logging as transformers_logging

from families import tiny_config, tiny_model
from lingualinked.errors import CheckpointError
from lingualinked.model.hf_internals import building, cache_layers, computing, loading
from lingualinked.model.kv.counting_layers import Counting
from lingualinked.model.kv.kv_layers import GrowingLayer, GrowingSlidingLayer


def meta(family: str) -> transformers.PreTrainedModel:
    cls = type(tiny_model(family, torch.float32))
    return building.build_on_meta(cls, tiny_config(family), torch.bfloat16, "eager")


def test_from_config_builds_on_meta_with_dtype_and_attention() -> None:
    model = meta("llama")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_all_tied_weights_keys_maps_target_to_source() -> None:
    model = meta("llama-tied")
    assert building.ties(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    building.set_ties(model, {})
    assert building.ties(model) == {}


def test_is_hf_initialized_spares_weights_that_are_loaded() -> None:
    model = tiny_model("llama", torch.float32)
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    building.mark_initialized(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.initialize_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rename_source_key_and_get_model_conversion_mapping_give_the_loaders_names() -> None:
    keys = [
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.block_sparse_moe.experts.0.w3.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "layers.0.input_layernorm.weight",
        "model.norm.weight",
        "nothing.of.the.kind",
    ]
    mapped = loading.map_keys(meta("mixtral"), keys)
    fused = loading.MappedKey(("model.layers.0.mlp.experts.gate_up_proj",), True)
    assert mapped == {
        keys[0]: fused,
        keys[1]: fused,
        keys[2]: loading.MappedKey(("model.layers.0.mlp.gate.weight",), False),
        keys[3]: loading.MappedKey(("model.layers.0.input_layernorm.weight",), False),
        keys[4]: loading.MappedKey(("model.norm.weight",), False),
        keys[5]: loading.MappedKey((), False),
    }


def test_dot_natural_key_sorts_layers_by_number() -> None:
    assert sorted(["a.10.w", "a.9.w"], key=core_model_loading.dot_natural_key) == ["a.9.w", "a.10.w"]


def test_layer_type_registers_no_layer_of_ours() -> None:
    made = [cache_layers.subclass_of(Counting, kind) for kind in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values()]
    for layer in (GrowingLayer, GrowingSlidingLayer, *made):
        assert layer._layer_type is None
    kinds = {type(layer) for layer in DynamicCache(config=tiny_config("gemma2")).layers}
    assert kinds == {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer}


def test_hf_deactivate_async_load_makes_the_loader_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_threads(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the loader started threads")

    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", no_threads)
    model = tiny_model("llama", torch.float32)
    loaded = loading.load_model(
        LlamaForCausalLM, model.config, model.state_dict(), dtype=torch.float32, attn_implementation=None
    )
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("setting", [None, "0"])
def test_what_is_set_while_loading_is_set_back(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(name, setting)
    bars = transformers_logging.is_progress_bar_enabled()

    def load_and_fail() -> None:
        with loading.quiet_loading():
            assert os.environ[name] == "1"
            assert not transformers_logging.is_progress_bar_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        load_and_fail()
    assert os.environ.get(name) == setting
    assert transformers_logging.is_progress_bar_enabled() == bars


def test_the_load_report_comes_from_the_logger_that_is_listened_to() -> None:
    model = tiny_model("llama", torch.float32)
    state = model.state_dict()
    del state["lm_head.weight"]
    with loading.quiet_loading() as reports:
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    assert any("LOAD REPORT" in report and "lm_head.weight" in report for report in reports)
    assert not logging.getLogger("transformers.modeling_utils").filters


@pytest.mark.parametrize("change", ["missing", "mismatched", "unexpected"])
def test_output_loading_info_names_what_is_wrong(change: str) -> None:
    model = tiny_model("llama", torch.float32)
    state = model.state_dict()
    if change == "missing":
        del state["model.norm.weight"]
    elif change == "mismatched":
        state["model.norm.weight"] = torch.zeros(5)
    else:
        state["model.norm.weight.of.another"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=f"{change} keys .*model.norm.weight"):
        loading.load_model(LlamaForCausalLM, model.config, state, dtype=torch.float32, attn_implementation=None)


def test_cached_file_gives_none_for_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "there.json").touch()
    assert loading.find_file(str(tmp_path), "there.json") == str(tmp_path / "there.json")
    assert loading.find_file(str(tmp_path), "missing.json") is None
    assert loading.find_file("not/there", "any.json", cache_dir=tmp_path, local_files_only=True) is None


@pytest.mark.parametrize(("device", "is_hidden"), [(None, False), ("cpu", True), (-1, True)])
def test_a_pipeline_asks_for_the_device_map_where_it_is_made(device: str | int | None, is_hidden: bool) -> None:
    seen = []

    class Asked(type(tiny_model("llama", torch.float32))):
        @property
        def hf_device_map(self) -> None:
            seen.append(building.makes_pipeline_for_device(sys._getframe(1)))

    model = tiny_model("llama", torch.float32)
    model.__class__ = Asked
    transformers.TextGenerationPipeline(model=model, tokenizer=None, device=device)
    assert seen[0] is is_hidden
    assert not building.makes_pipeline_for_device(sys._getframe())


@pytest.mark.parametrize(("family", "has_rotation"), [("llama", True), ("qwen3-moe", True), ("gpt2", False)])
def test_a_models_rotary_function_can_be_replaced_for_one_step(family: str, has_rotation: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    modules = computing.rotary_modules(model)
    assert modules == ([sys.modules[type(model).__module__]] if has_rotation else [])
    for module in modules:
        own = module.apply_rotary_pos_emb
        with computing.computed_rotation(modules, lambda function: [function]):
            assert module.apply_rotary_pos_emb == [own]
        assert module.apply_rotary_pos_emb is own


def test_all_attention_functions_can_be_replaced_for_one_step() -> None:
    functions = computing.ALL_ATTENTION_FUNCTIONS
    assert functions["sdpa"] is computing.torch_attention
    with computing.computed_attention(print):
        assert functions["sdpa"] is print
        with computing.computed_attention(len):
            assert functions["sdpa"] is print
    assert functions["sdpa"] is computing.torch_attention

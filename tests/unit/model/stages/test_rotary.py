"""The stretching of rotary embeddings is counted as transformers' own modules count it."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from families import rope_config
from lingualinked.model.hf_internals.computing import dynamic_ropes
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.rotary import RopeReach


def spec_of(config: object) -> ModelSpec:
    return ModelSpec(
        class_name="LlamaForCausalLM",
        config_json=config.to_json_string(use_diff=False),
        dtype="float32",
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )


LENGTHS = st.lists(
    st.integers(1, 63) | st.integers(60, 68) | st.integers(64, 300), max_size=8
)  # 64 positions are its own


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@given(lengths=LENGTHS)
def test_a_new_module_is_stretched_as_an_old_one_is(family: str, lengths: list[int]) -> None:
    config = rope_config(family, "dynamic")
    kind = LlamaRotaryEmbedding if family == "llama" else Gemma3RotaryEmbedding
    layer_types = [{}] if family == "llama" else [{"layer_type": each} for each in config.rope_parameters]
    old, reach, states = kind(config), RopeReach(spec_of(config)), torch.empty(0)
    used = kind(config)
    for length in lengths:
        before = reach.advance(length)
        for module in (kind(config), used):  # a new one, and one that has seen other texts
            ropes = dynamic_ropes(module)
            assert len(ropes) == len(layer_types)
            for rope in ropes:
                rope.stretch(before, torch.device("cpu"))
            for name, buffer in old.named_buffers():
                if "original" not in name:
                    assert torch.equal(buffer, module.get_buffer(name)), (length, name)
        for arguments in layer_types:
            old(states, torch.arange(length)[None], **arguments)
            used(states, torch.arange(2 * length)[None], **arguments)


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3", "longrope"])
def test_other_types_keep_nothing(rope_type: str) -> None:
    config = rope_config("llama", rope_type)
    reach = RopeReach(spec_of(config))
    assert [reach.advance(length) for length in (9, 300, 70)] == [0, 0, 0]
    assert dynamic_ropes(LlamaRotaryEmbedding(config)) == []


def test_models_without_rotary_embeddings_keep_nothing() -> None:
    spec = spec_of(rope_config("llama", "default"))
    for parameters in (None, {}, {"full_attention": None}):
        fields = json.loads(spec.config_json) | {"rope_parameters": parameters}
        bare = ModelSpec(
            **{name: getattr(spec, name) for name in ModelSpec.__slots__} | {"config_json": json.dumps(fields)}
        )
        assert RopeReach(bare).advance(1000) == 0

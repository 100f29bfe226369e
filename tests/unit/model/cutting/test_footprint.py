"""What layers keep is measured per token and per row, whichever kind it is of."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import JambaConfig, MambaConfig, PreTrainedConfig

from lingualinked.model.cutting.footprint import measure_footprint
from lingualinked.model.cutting.parts import find_parts
from lingualinked.model.hf_internals import building
from lingualinked.model.spec import ModelSpec
from lingualinked.profile import ModelProfile

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4}


def profile_of(class_name: str, config: PreTrainedConfig) -> ModelProfile:
    spec = ModelSpec(
        class_name=class_name,
        config_json=config.to_json_string(use_diff=False),
        dtype="bfloat16",
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )
    meta = building.build_on_meta(getattr(transformers, class_name), config, torch.bfloat16, None)
    return measure_footprint(meta, find_parts(meta), spec).profile


def test_recurrent_states_beside_attention() -> None:
    config = JambaConfig(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        use_mamba_kernels=False,
    )
    profile = profile_of("JambaForCausalLM", config)
    assert profile.layer_kv_bytes == (0, 2 * 2 * 8 * 2) * 2  # keys and values x heads x dim x bfloat16
    convolution, recurrent = 64 * 4 * 2, 64 * 8 * 4  # the recurrent state is of float32
    assert profile.layer_state_bytes == (convolution + recurrent, 0) * 2


def test_a_model_of_recurrent_states_alone() -> None:
    profile = profile_of("MambaForCausalLM", MambaConfig(**SMALL, state_size=8))
    assert profile.layer_kv_bytes == (0,) * 4
    assert all(profile.layer_state_bytes)
    assert len(set(profile.kind_of_layer)) == 1


@pytest.mark.parametrize("shared", [0, 2])
def test_layers_that_use_the_kv_of_others_keep_none(shared: int) -> None:
    config = transformers.Gemma3nTextConfig(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=shared,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    )
    profile = profile_of("Gemma3nForCausalLM", config)
    assert profile.layer_kv_bytes == (64,) * (4 - shared) + (0,) * shared
    assert profile.layer_windows[:2] == (6, None)

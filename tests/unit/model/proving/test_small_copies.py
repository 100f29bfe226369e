"""A small copy of a configuration has all that the forward pass depends on, and little of the rest."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen3NextConfig,
)

from lingualinked.model.proving.small_copies import VOCABULARY, small_copies


def smallest(config: PreTrainedConfig) -> Any:
    return next(small_copies(config)).get_text_config(decoder=True)


def test_a_large_llama_becomes_narrow_and_short() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, head_dim=128
    )
    small = smallest(config)
    assert small.hidden_size == 32 == small.num_attention_heads * small.head_dim
    assert small.num_attention_heads % small.num_key_value_heads == 0
    assert small.num_key_value_heads > 1  # several heads share keys, and not all
    assert (small.num_hidden_layers, small.vocab_size) == (4, VOCABULARY)
    assert config.hidden_size == 8192


def test_all_kinds_of_layers_are_kept() -> None:
    assert set(smallest(Gemma3Config()).layer_types) == {"sliding_attention", "full_attention"}
    assert set(smallest(Qwen3NextConfig()).layer_types) == {"linear_attention", "full_attention"}
    small = smallest(JambaConfig())
    assert small.num_hidden_layers > small.attn_layer_period


def test_windows_are_shorter_than_the_prompts_of_a_trial() -> None:
    assert smallest(Gemma3Config()).sliding_window == 8


def test_experts_are_few_and_groups_hold_several() -> None:
    small = smallest(DeepseekV3Config())
    assert small.n_routed_experts // small.n_group >= 2
    assert small.topk_group < small.n_group
    assert small.num_experts_per_tok <= small.n_routed_experts // small.n_group


def test_ids_of_special_tokens_are_in_the_vocabulary_and_differ() -> None:
    small = smallest(
        LlamaConfig(vocab_size=128256, bos_token_id=128000, eos_token_id=[128001, 128008], pad_token_id=None)
    )
    assert len({small.bos_token_id, *small.eos_token_id}) == 3
    assert max(small.bos_token_id, *small.eos_token_id) < VOCABULARY
    assert small.pad_token_id is None


def test_sections_of_rotary_embeddings_still_fill_half_a_head() -> None:
    small = smallest(
        Qwen2VLConfig(
            text_config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
        )
    )
    head_dim = small.hidden_size // small.num_attention_heads
    assert sum(small.rope_parameters["mrope_section"]) == head_dim // 2


@pytest.mark.parametrize(
    "config", [GPT2Config(n_embd=30, n_head=3, n_layer=1), LlamaConfig(hidden_size=16, num_attention_heads=2)]
)
def test_what_is_small_is_not_made_smaller(config: PreTrainedConfig) -> None:
    small = smallest(config)
    assert small.hidden_size == config.hidden_size
    assert small.num_hidden_layers == min(4, config.num_hidden_layers)

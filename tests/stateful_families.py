"""Tiny random models, one for each kind of state that a session has: KV of full and sliding attention, and what there is besides.

Knows configurations and how to save them as checkpoints; nothing of what is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from families import rope_config, tiny_config

_COMMON: dict[str, Any] = {
    "vocab_size": 512,  # as many as a trial needs
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}

# kind of state: (model type, arguments beyond the common ones)
STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "state space": ("mamba", {"state_size": 4, "time_step_rank": 4}),
    "state space and attention": (
        "jamba",
        {
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "use_mamba_kernels": False,
        },
    ),
    "both in one layer": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    ),
    "linear attention": (
        "qwen3_next",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    "convolution": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "indexed": ("deepseek_v32", {**_LATENT, "index_topk": 6, "index_n_heads": 4, "index_head_dim": 8}),
    "latent": ("deepseek_v3", _LATENT),
    "in modules": (
        "recurrent_gemma",
        {
            "lru_width": 32,
            "num_key_value_heads": 1,
            "attention_window_size": 6,
            "block_types": ["recurrent", "attention"],
        },
    ),
}

KINDS = ("sliding", "stretched", *STATES)
CROPPABLE = ("sliding", "stretched", "latent")  # tokens at the end can be removed again


def state_config(kind: str) -> PreTrainedConfig:
    """Return the configuration of a tiny model whose sessions have this kind of state."""
    if kind == "sliding":
        return tiny_config("gemma2")
    if kind == "stretched":
        config = rope_config("llama", "dynamic")
        assert config is not None
        return config
    model_type, arguments = STATES[kind]
    return CONFIG_MAPPING[model_type](**{**_COMMON, **arguments})


def save_stateful(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny random model whose sessions have this kind of state."""
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(state_config(kind), dtype=dtype).save_pretrained(folder)
    return folder

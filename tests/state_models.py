"""Tiny random models whose layers keep something else than keys and values of full or sliding attention.

Knows configurations, and how to save them; nothing of what is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from families import VOCABULARY

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OF_ALL = {name: _COMMON[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, **_LATENT}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
_MAMBA2 = {
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}

# name: (model type, arguments beyond the common ones)
STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "falcon-mamba": ("falcon_mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("bamba", {**_MAMBA2, "attn_layer_indices": [1, 3], "mamba_chunk_size": 8}),
    "falcon-h1": (
        "falcon_h1",
        {**_MAMBA2, "head_dim": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            **_DELTA,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}),
    "deepseek-v32": ("deepseek_v32", {**_INDEXED, **_ROUTED}),
    "deepseek-v4": (
        "deepseek_v4",
        {
            "head_dim": 16,
            "q_lora_rank": 16,
            "o_lora_rank": 8,
            "o_groups": 2,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "num_key_value_heads": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "sliding_window": 6,
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **{name: value for name, value in _MAMBA2.items() if name != "mamba_d_head"},
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
}

# Models that keep an object of a class of their own, or nothing.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "rwkv": (
        "rwkv",
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "attention_hidden_size": 32,
            "context_length": 64,
            "rescale_every": 2,
        },
    ),
    "xlstm": ("xlstm", {"hidden_size": 128, "num_hidden_layers": 4, "num_heads": 2, "chunk_size": 4}),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48, "mem_len": 64}),
    "openai-gpt": ("openai-gpt", {"n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}),
}


def state_config(name: str) -> PreTrainedConfig:
    """Configure one of the models."""
    model_type, arguments = (STATES | OWN)[name]
    common = _COMMON if name in STATES else _OF_ALL
    return CONFIG_MAPPING[model_type](**(common | arguments))


def save_state_model(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """Save one of the models, with random weights that are large enough to tell its layers apart."""
    model = AutoModelForCausalLM.from_config(state_config(name)).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder

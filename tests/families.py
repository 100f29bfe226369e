"""Tiny random models of every supported architecture, in the variants that take different ways through its code.

Knows configurations, and how to save them as checkpoints; nothing of what is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from accelerators import on_accelerator

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# name: (model type, arguments beyond the common ones)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "cohere": ("cohere", {**_GATED, "use_qk_norm": True}),
    "falcon-7b": ("falcon", {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gemma": ("gemma", {**_GATED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_GATED, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {**_GATED, "head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    ),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {"intermediate_size": 64, "rotary_pct": 0.5}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "granite": ("granite", {**_GATED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "llama": ("llama", _GATED),
    "llama-tied": ("llama", {**_GATED, "tie_word_embeddings": True, "attention_bias": True}),
    "llama-wide": (  # wide enough for packed weights
        "llama",
        {**_GATED, "hidden_size": 96, "intermediate_size": 160, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-dynamic": (
        "llama",
        {**_GATED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral": ("mistral", {**_GATED, "sliding_window": 6}),
    "mixtral": ("mixtral", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "mpt": ("mpt", {"expansion_ratio": 2, "max_seq_len": 64}),
    "olmo": ("olmo", {**_GATED, "clip_qkv": 4.0}),
    "olmo2": ("olmo2", _GATED),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt-350m": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi": ("phi", {"intermediate_size": 64}),
    "phi3": ("phi3", {**_GATED, "sliding_window": 6}),
    "qwen2": ("qwen2", {**_GATED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen2-moe": ("qwen2_moe", {**_GATED, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3": ("qwen3", {**_GATED, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", {**_GATED, **_EXPERTS, "head_dim": 16}),
    "smollm3": ("smollm3", {**_GATED, "no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", {**_GATED, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {**_GATED, "sliding_window": 6}),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Configure the tiny model of a family."""
    model_type, arguments = FAMILIES[family]
    return CONFIG_MAPPING[model_type](**(_COMMON | arguments))


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def rope_config(family: str, rope_type: str) -> PreTrainedConfig | None:
    """Configure the tiny model of a family with another kind of rotary embedding; None if it has none."""
    config = tiny_config(family)
    given = getattr(config, "rope_parameters", None)
    if given is None:
        return None
    if getattr(config, "head_dim", 0) is None:  # what mixtral leaves out, its rotary embeddings need
        config.head_dim = config.hidden_size // config.num_attention_heads
    by_type = given if "rope_type" not in given else {"": given}
    size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    half = int(size * next(iter(by_type.values())).get("partial_rotary_factor", 1.0)) // 2
    original = {"original_max_position_embeddings": 32}
    extra: dict[str, Any] = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, **original},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        "longrope": {"short_factor": [1.0] * half, "long_factor": [3.0] * half, **original},
    }[rope_type]
    changed = {kind: {**each, "rope_type": rope_type, **extra} for kind, each in by_type.items()}
    config.rope_parameters = changed.get("", changed)
    if rope_type == "longrope":
        config.original_max_position_embeddings = 32
    return config


def tiny_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Make the tiny model of a family, every parameter random: none may be missed, none mistaken for another."""
    generator = torch.Generator().manual_seed(sum(family.encode()))
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(std=0.15, generator=generator)
            parameter.copy_(noise + (parameter if parameter.ndim == 1 else 0))
    return model.eval()


def save_tiny(family: str, dtype: torch.dtype, folder: Path, **arguments: Any) -> Path:
    """Save the tiny model of a family as a checkpoint."""
    tiny_model(family, dtype).save_pretrained(folder, **arguments)
    return folder


def save_several_parts(folder: Path) -> Path:
    """Save a checkpoint of six layers in two files, in which each layer takes several parts of 1 MiB."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="12MB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def reference(folder: Path, **arguments: Any) -> PreTrainedModel:
    """Load a checkpoint unsharded, its parameters cloned: mapped ones are not aligned, which shifts the last bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return on_accelerator(model.eval())

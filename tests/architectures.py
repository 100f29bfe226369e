"""Every decoder-only model type of the installed transformers: a configuration of each, and what cutting a small copy of it shows.

Knows no architecture but for what defaults lack that transformers itself can't run.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lingualinked.errors import LingualinkedError
from lingualinked.model.cutting.architectures import check_architecture
from lingualinked.model.cutting.parts import build_meta, parts_of
from lingualinked.model.proving.small_model import SmallModel
from lingualinked.model.proving.trial import try_cutting
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage

# Decoders of encoder-decoder models, assistants of other models, models of bytes or audio, and what does not run as text.
OTHERS = frozenset(
    {
        "bert-generation",
        "blt",
        "gemma3n",
        "gemma4_assistant",
        "gemma4_unified_assistant",
        "hrm_text",
        "musicgen",
        "musicgen_melody",
        "trocr",
    }
)

_EXPERTS = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}

# What the defaults of a configuration lack, without which transformers itself can't run the model.
NEEDED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]}
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 4, "clip_qkv": 8.0}},
    "deepseek_v2": {**_EXPERTS, "moe_intermediate_size": 1408, "topk_method": "group_limited_greedy"},
    "dots1": _EXPERTS,
    "glm4_moe": {"head_dim": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found for one model type in one dtype."""

    model_type: str
    class_name: str
    dtype: str
    exact: tuple[str, ...] = ()
    difference: str = ""
    crosses: tuple[str, ...] = ()  # beside the output of the layer before
    hop_bytes: int = 0  # per token, of the model in full width in bfloat16; 0: not known
    shortcut_bytes: int = 0  # likewise, of what skips stages
    worst_ratio: float = 0.0  # of the bytes that a stage reads, without headers, and its own


def decoder_only_types() -> list[str]:
    """Return the model types that generate text token by token with one stack."""
    return [
        model_type
        for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if model_type not in OTHERS
        and (model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or model_type == "reformer")
        and not CONFIG_MAPPING[model_type].is_encoder_decoder
    ]


def draw_types(text: str) -> list[str]:
    """Return a fifth of the model types, chosen by a text such as a commit."""
    every = decoder_only_types()
    return sorted(random.Random(text).sample(every, -(-len(every) // 5)))


def default_config(model_type: str) -> PreTrainedConfig:
    """Return the configuration that a model type has by default, with what it needs to run."""
    return CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))


def spec_of_config(config: PreTrainedConfig, dtype: str) -> ModelSpec:
    """Describe a model without files."""
    return ModelSpec(
        class_name=check_architecture(config),
        config_json=config.to_json_string(use_diff=False),
        dtype=dtype,
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )


def find_row(model_type: str, dtype: str, config: PreTrainedConfig | None = None) -> Row:
    """Try a model type in stages, and look at what crosses their boundaries."""
    config = default_config(model_type) if config is None else config
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    ratios, crosses = [0.0], dict[str, None]()

    def watch(model: SmallModel, stages: list[Stage]) -> None:
        transmission = stages[0].span.parts.transmission
        crosses.update((each.name, None) for each in transmission.shortcuts)
        if any(items is not None and sum(items) > 1 for items in transmission.items):
            crosses["items of tuples"] = None
        if transmission.held:
            crosses[f"held: {', '.join(transmission.held)}"] = None
        if transmission.forbidden_cuts:
            crosses[f"no cut before {', '.join(map(str, transmission.forbidden_cuts))}"] = None
        headers = sum(_header_bytes(Path(file.path)) for file in model.spec.files)
        ratios.extend((each.num_bytes_read - headers) / each.weight_bytes for each in stages)

    try:
        trial = try_cutting(config, spec_of_config(config, dtype), per_layer=True, watch=watch)
    except LingualinkedError as error:
        return Row(model_type=model_type, class_name=class_name, dtype=dtype, difference=f"refused: {error}")
    return Row(
        model_type=model_type,
        class_name=class_name,
        dtype=dtype,
        exact=trial.exact,
        difference=trial.difference,
        crosses=tuple(crosses),
        worst_ratio=max(ratios),
    )


def with_hop_bytes(row: Row) -> Row:
    """Add the bytes that cross a boundary in the middle of the model in full width, if it can be traced."""
    try:
        spec = spec_of_config(default_config(row.model_type), "bfloat16")
        parts = parts_of(spec, build_meta(spec))
    except LingualinkedError:
        return row
    outputs = parts.layer_outputs[parts.num_layers // 2]
    hop = sum(_token_bytes(each.shape, each.dtype) for each in outputs)
    shortcuts = sum(each.token_bytes for each in parts.transmission.shortcuts)
    return dataclasses.replace(row, hop_bytes=hop, shortcut_bytes=shortcuts)


def _token_bytes(shape: tuple[int | str, ...], dtype: str) -> int:
    size = getattr(torch, dtype).itemsize
    for each in shape:
        size *= each if isinstance(each, int) else 1
    return int(size)


def _header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")

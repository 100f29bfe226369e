"""The architectures that can be cut, and the errors for all others.

Knows configurations only; no weights, no modules, no spans.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lingualinked.errors import CheckpointError, UncuttableModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lingualinked.model.spec import ModelSpec

# To add an architecture, add its configurations to tests/families.py, whose tests show that it is bit-equal.
SUPPORTED_ARCHITECTURES = {
    "bloom": "BloomForCausalLM",
    "cohere": "CohereForCausalLM",
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gptj": "GPTJForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mpt": "MptForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


def check_architecture(config: PreTrainedConfig) -> str:
    """Return the transformers class that runs a configuration as a causal LM, after checking that it can be cut."""
    model_type = config.model_type
    name = (config.architectures or [model_type or type(config).__name__])[0]
    if config.is_encoder_decoder:
        raise UncuttableModelError(
            name, "it is an encoder-decoder model, and only decoder-only causal language models have one stack to cut"
        )
    if model_type not in SUPPORTED_ARCHITECTURES:
        raise UncuttableModelError(name, _refusal_reason(config))
    if getattr(config, "add_cross_attention", False):
        raise UncuttableModelError(
            name,
            "its layers attend to an encoder (add_cross_attention=True); load a checkpoint without cross-attention",
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise CheckpointError(
            f"the checkpoint of {name} is quantised (quantization_config: {as_dict.get('quant_method', 'unknown')}), "
            "which is not supported yet: load the unquantised checkpoint of the same model"
        )
    return SUPPORTED_ARCHITECTURES[model_type]


def _refusal_reason(config: PreTrainedConfig) -> str:
    """Return why a model type outside the list is refused."""
    model_type = config.model_type
    if model_type not in CONFIG_MAPPING:
        return (
            f"its code is not part of transformers (model_type {model_type!r}), and custom code can't be cut: "
            "use a checkpoint of an architecture that is part of transformers"
        )
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return (
            f"{model_type!r} is an encoder-only architecture, which predicts masked tokens and can't generate text: "
            "use a decoder-only causal language model"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"{model_type!r} has no causal language model in transformers: use a decoder-only causal language model"
    return (
        f"{model_type!r} is not among the architectures that are tested to be exact when cut "
        f"({', '.join(sorted(SUPPORTED_ARCHITECTURES))})"
    )


def read_config(spec: ModelSpec) -> PreTrainedConfig:
    """Rebuild the configuration of a spec, with options that only concern the caller's output turned off."""
    fields = json.loads(spec.config_json)
    config: PreTrainedConfig = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    config.output_hidden_states = False
    config.output_attentions = False
    config.return_dict = True
    return config

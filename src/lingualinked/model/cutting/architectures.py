"""The architectures that can be cut, and the errors for all others.

Knows configurations only; no weights, no modules, no spans.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lingualinked.errors import CheckpointError, UncuttableModelError
from lingualinked.model.custom_code import import_class
from lingualinked.model.cutting.tasks import is_known_class
from lingualinked.model.hf_internals import building

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lingualinked.model.spec import CustomCode, ModelSpec


_REFUSED = {
    "diffusion_gemma": "it generates blocks of tokens by diffusion, and not one token after the other: use a causal language model",
    "reformer": "each of its layers needs two streams of hidden states and their hashes, which its cache keeps together: "
    "use another architecture",
}
"""Model types whose forward passes can't end at a layer, with the reason."""

# To add one, add its configuration to tests/encoder_decoders.py, whose tests show that it is bit-equal.
_ENCODER_DECODERS = ("bart", "blenderbot", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5")


def check_architecture(config: PreTrainedConfig, code: CustomCode | None = None) -> str:
    """Return the class that runs a configuration as a causal LM, of transformers or of `code`, after checking that it can be cut.

    If there is none, that is the one that sees pictures too; of an encoder-decoder model, the one with both stacks.
    """
    model_type = config.model_type
    name = (config.architectures or [model_type or type(config).__name__])[0]
    if code is None and model_type in _REFUSED:
        raise UncuttableModelError(name, _REFUSED[model_type])
    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    class_name: str | None = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, seeing)
    if config.is_encoder_decoder:
        if code is not None or model_type not in _ENCODER_DECODERS:
            raise UncuttableModelError(
                name,
                f"{model_type!r} is none of the encoder-decoder architectures that are tested to be exact when cut "
                f"({', '.join(_ENCODER_DECODERS)})",
            )
        class_name = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[model_type]
    elif code is not None:
        class_name = code.model.partition(".")[2]
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        class_name = None
    if class_name is None:
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
    return class_name


def _refusal_reason(config: PreTrainedConfig) -> str:
    """Return why no class of transformers runs a model type as a causal language model."""
    model_type = config.model_type
    if model_type not in CONFIG_MAPPING:
        return (
            f"its code is not part of transformers (model_type {model_type!r}): where the checkpoint has it, and you trust it, pass "
            "trust_remote_code=True"
        )
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return (
            f"{model_type!r} is an encoder-only architecture, which predicts masked tokens and can't generate text: "
            "use a decoder-only causal language model"
        )
    return f"{model_type!r} has no causal language model in transformers: use a decoder-only causal language model"


def find_class(spec: ModelSpec) -> type[PreTrainedModel]:
    """Return the class of a spec: of transformers, or of the checkpoint's own code; raise UncuttableModelError for others."""
    if spec.code is None:
        has_stacks = spec.class_name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        if not (has_stacks or is_known_class(spec.class_name)):
            raise UncuttableModelError(spec.class_name, "transformers has no such class of a causal language model")
        found: type[PreTrainedModel] = getattr(transformers, spec.class_name)
        return found
    found = import_class(spec.code, spec.code.model)
    if not issubclass(found, PreTrainedModel):
        raise UncuttableModelError(spec.class_name, "its class is no transformers.PreTrainedModel")
    return found


def read_config(spec: ModelSpec) -> PreTrainedConfig:
    """Rebuild the configuration of a spec, with options that only concern the caller's output turned off.

    Of a model with a configuration for each of its parts, that of the text if the class of the spec takes that.
    """
    fields = json.loads(spec.config_json)
    own = spec.code is not None and spec.code.config
    kind = import_class(spec.code, own) if spec.code is not None and own else CONFIG_MAPPING[fields["model_type"]]
    config: PreTrainedConfig = kind.from_dict(building.decode_floats(kind, fields))
    wanted = find_class(spec).config_class
    if wanted is not None and not isinstance(config, wanted):
        config = config.get_text_config(decoder=True)
    config.output_hidden_states = False
    config.output_attentions = False
    config.return_dict = True
    return config

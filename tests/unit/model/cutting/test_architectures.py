import json

import pytest
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    ProphetNetConfig,
    ViTConfig,
)

from families import FAMILIES, tiny_config
from lingualinked.errors import CheckpointError, UncuttableModelError
from lingualinked.model.cutting.architectures import check_architecture, read_config
from lingualinked.model.spec import ModelSpec


def spec_of(config: PreTrainedConfig) -> ModelSpec:
    return ModelSpec(
        class_name=check_architecture(config),
        config_json=config.to_json_string(use_diff=False),
        dtype="float32",
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_the_journey(family: str) -> None:
    config = tiny_config(family)
    assert read_config(spec_of(config)).to_dict() == config.to_dict()


def test_what_only_concerns_outputs_is_off() -> None:
    config = read_config(spec_of(LlamaConfig(output_hidden_states=True, return_dict=False)))
    assert (config.output_hidden_states, config.output_attentions, config.return_dict) == (False, False, True)


def test_the_spec_is_plain_data() -> None:
    spec = spec_of(LlamaConfig())
    assert json.loads(spec.config_json)["model_type"] == "llama"
    assert hash(spec) == hash(spec_of(LlamaConfig()))


class CustomConfig(PreTrainedConfig):
    model_type = "my-own"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ProphetNetConfig(), "prophetnet.* encoder-decoder"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM .* encoder-only"),
        (ViTConfig(), "no causal language model"),
        (CustomConfig(), "trust_remote_code=True"),
        (GPT2Config(add_cross_attention=True), "cross-attention"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else None,
)
def test_what_can_not_be_cut_is_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UncuttableModelError, match=reason):
        check_architecture(config)


def test_quantised_weights_are_refused_by_name() -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM is quantised .*awq.* unquantised"):
        check_architecture(config)

"""What stages were built from can't be changed in a config without a word; what the caller reads can."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig, PreTrainedConfig

import lingualinked as ll
from lingualinked.sharded.sealed.sealed_config import SealedConfig


def change(config: PreTrainedConfig, name: str) -> None:
    value = getattr(config, name)
    setattr(config, name, not value if isinstance(value, bool) else value * 2 if value else 7)


@pytest.mark.parametrize("make", [LlamaConfig, GPT2Config, Gemma2Config])
def test_each_field_of_the_architecture_is_the_stages(make: Callable[[], PreTrainedConfig]) -> None:
    own = set(vars(make())) - set(vars(PreTrainedConfig())) - {"use_cache", "vocab_size"}
    numbers = [name for name in own if isinstance(getattr(make(), name), bool | int | float) and "token_id" not in name]
    assert len(numbers) > 8
    for name in numbers:
        config = make()
        sealed = SealedConfig(config)
        change(config, name)
        with pytest.raises(ll.UnsupportedOperationError, match=rf"config\.{name} was .*no effect.*set it back"):
            sealed.check(config)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.rope_parameters.update(rope_theta=5.0),
        lambda config: setattr(config, "_attn_implementation", "eager"),
        lambda config: setattr(config, "dtype", "float16"),
        lambda config: vars(config).pop("hidden_act"),
        lambda config: vars(config).update(hidden_act="gelu"),
    ],
)
def test_edits_in_place_are_seen(edit: Callable[[PreTrainedConfig], object]) -> None:
    config = LlamaConfig()
    sealed = SealedConfig(config)
    edit(config)
    with pytest.raises(ll.UnsupportedOperationError, match="when the stages of this sharded model were built"):
        sealed.check(config)


def test_a_config_can_be_set_back_and_replaced_by_an_equal_one() -> None:
    config = LlamaConfig()
    sealed = SealedConfig(config)
    config.rms_norm_eps = 1.0
    with pytest.raises(ll.UnsupportedOperationError, match="pass rms_norm_eps= to"):
        sealed.check(config)
    config.rms_norm_eps = 1e-6
    sealed.check(config)
    sealed.check(copy.deepcopy(config))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pad_token_id", 3),
        ("eos_token_id", [2, 3]),
        ("use_cache", False),
        ("return_dict", False),
        ("vocab_size", 64),
        ("problem_type", "x"),
        ("a_note", 1),
    ],
)
def test_what_the_caller_reads_is_changeable(name: str, value: object) -> None:
    config = LlamaConfig()
    sealed = SealedConfig(config)
    setattr(config, name, value)
    sealed.check(config)
    config.rms_norm_eps = 1.0
    with pytest.raises(ll.UnsupportedOperationError, match=r"config\.rms_norm_eps"):
        sealed.check(config)

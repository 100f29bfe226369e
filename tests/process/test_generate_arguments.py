"""Each argument of ``generate``, and each setting of a GenerationConfig, has transformers' effect or is refused by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.sharded.generating.generation import ShardedGeneration

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
SAMPLING = {"do_sample": True, "max_new_tokens": 12}
BEAMS = {"num_beams": 3, "max_new_tokens": 12}
DICT = {"return_dict_in_generate": True}

# Settings with transformers' effect: what sets each (and something that it has an effect on).
EFFECTIVE: dict[str, dict[str, Any]] = {
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9, "prompt_lookup_num_tokens": 2},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5, "prompt_lookup_num_tokens": 2},  # an error
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "bad_words_ids": {"bad_words_ids": [[13], [17, 93]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(60))},
    "bos_token_id": {"bos_token_id": 5, "inputs": None},
    "cache_config": {"cache_config": {}},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "constraints": {"constraints": [], **BEAMS},  # of the hub: an error
    "decoder_start_token_id": {"decoder_start_token_id": 3},
    "disable_compile": {"disable_compile": True},
    "diversity_penalty": {"diversity_penalty": 0.5, "num_beam_groups": 2, "num_beams": 4},  # of the hub: an error
    "do_sample": {"do_sample": True},
    "early_stopping": {"early_stopping": "never", "eos_token_id": list(range(30)), **BEAMS},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "eos_token_id": {"eos_token_id": list(range(60)), "max_new_tokens": 30},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01, **SAMPLING},
    "eta_cutoff": {"eta_cutoff": 0.01, **SAMPLING},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 2},
    "force_words_ids": {"force_words_ids": [[9]], **BEAMS},  # of the hub: an error
    "forced_bos_token_id": {"forced_bos_token_id": 9, "inputs": None},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "guidance_scale": {"guidance_scale": 1.7},
    "is_assistant": {"is_assistant": True, "output_scores": True, **DICT},
    "length_penalty": {"length_penalty": -3.0, "eos_token_id": list(range(30)), **BEAMS},
    "low_memory": {"low_memory": True},
    "max_cache_len": {"max_cache_len": 64},
    "max_length": {"max_length": 12, "max_new_tokens": None},
    "max_matching_ngram_size": {"max_matching_ngram_size": 1, "prompt_lookup_num_tokens": 2},
    "max_new_tokens": {"max_new_tokens": 3},
    "max_time": {"max_time": 0.0},
    "min_length": {"min_length": 15, "eos_token_id": list(range(60))},
    "min_new_tokens": {"min_new_tokens": 7, "eos_token_id": list(range(60))},
    "min_p": {"min_p": 0.3, **SAMPLING},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "num_beam_groups": {"num_beam_groups": 2, "num_beams": 4},  # of the hub: an error
    "num_beams": {"num_beams": 5},
    "num_return_sequences": {"num_return_sequences": 2, **BEAMS},
    "output_logits": {"output_logits": True, **DICT},
    "output_attentions": {"output_attentions": True, **DICT},  # none, but with eager attention
    "output_hidden_states": {"output_hidden_states": True, **DICT},
    "output_scores": {"output_scores": True, **DICT, **BEAMS},
    "pad_token_id": {"pad_token_id": 4, "inputs": torch.cat([IDS, IDS.flip(1)]), "eos_token_id": list(range(60))},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},  # of the hub: an error
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 4, "max_new_tokens": 30},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "output_scores": True, "repetition_penalty": 1.5, **DICT},
    "repetition_penalty": {"repetition_penalty": 1.9},
    "return_dict_in_generate": DICT,
    "sequence_bias": {"sequence_bias": [[[13], 5.0], [[17, 93], -5.0]]},
    "stop_strings": {"stop_strings": ["o", "x"], "max_new_tokens": 30},
    "suppress_tokens": {"suppress_tokens": list(range(60))},
    "target_lookbehind": {"target_lookbehind": 3},
    "temperature": {"temperature": 0.3, **SAMPLING},
    "token_healing": {"token_healing": True},
    "top_h": {"top_h": 0.4, **SAMPLING},
    "top_k": {"top_k": 3, **SAMPLING},
    "top_p": {"top_p": 0.3, **SAMPLING},
    "typical_p": {"typical_p": 0.3, **SAMPLING},
    "use_cache": {"use_cache": False},
    "watermarking_config": {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}, **SAMPLING},
}
REFUSED: dict[str, Any] = {
    "assistant_early_exit": 2,
    "cache_implementation": ["offloaded", "offloaded_static", "offloaded_hybrid", "quantized"],
    "compile_config": CompileConfig(),
    "dola_layers": "low",
    "speculation_type": "dflash",
    "use_mtp": True,
}
DEPRECATED = {"continuous_batching_config"}  # transformers itself points to generate_batch


def outcome(generate: Callable[[], Any]) -> dict[str, Any]:
    """Give what comes out: tensors by name, or the error."""
    torch.manual_seed(7)
    try:
        result = generate()
    except (ValueError, RuntimeError) as error:
        return {"error": str(error)}
    if isinstance(result, torch.Tensor):
        return {"sequences": result}
    return {name: value for name, value in result.items() if name != "past_key_values"}


def assert_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), ours.get("error") or theirs.get("error")
        for name in theirs:
            assert_equal(ours[name], theirs[name])
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    else:
        assert ours == theirs


def test_what_is_overridden_is_transformers_own() -> None:
    for name in (
        "_prepare_cache_for_generation",
        "_prepare_generation_config",
        "_prepare_static_cache",
        "_validate_model_kwargs",
    ):
        assert inspect.signature(getattr(ShardedGeneration, name)).parameters.keys() <= {
            *inspect.signature(getattr(GenerationMixin, name)).parameters, "args", "kwargs"
        }  # fmt: skip


def test_each_setting_is_accounted_for() -> None:
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert settings == EFFECTIVE.keys() | REFUSED.keys() | DEPRECATED


@pytest.mark.parametrize("name", EFFECTIVE)
def test_setting_has_its_effect(sharded: Any, unsharded: PreTrainedModel, tokenizer: Any, name: str) -> None:
    arguments = {"inputs": IDS, "max_new_tokens": 8, "eos_token_id": None, **EFFECTIVE[name]}
    if name in ("stop_strings", "token_healing"):
        arguments |= {"tokenizer": tokenizer}
    ours, theirs = (outcome(lambda model=model: model.generate(**arguments)) for model in (sharded, unsharded))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", REFUSED)
def test_setting_is_refused_by_name(sharded: Any, name: str) -> None:
    for value in REFUSED[name] if isinstance(REFUSED[name], list) else [REFUSED[name]]:
        with pytest.raises(ll.UnsupportedOperationError, match=name):
            sharded.generate(IDS, max_new_tokens=2, **{name: value})
        with pytest.raises(ll.UnsupportedOperationError, match=name):
            sharded.generate(IDS, generation_config=GenerationConfig(max_new_tokens=2, **{name: value}))


def test_each_argument_is_accounted_for() -> None:
    assert list(inspect.signature(GenerationMixin.generate).parameters) == [
        "self",
        "inputs",
        "generation_config",
        "logits_processor",  # test_generate.py
        "stopping_criteria",  # test_generate.py
        "prefix_allowed_tokens_fn",
        "synced_gpus",
        "assistant_model",  # here, and test_generate.py
        "streamer",  # test_pipeline.py
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
        "custom_generate",
        "kwargs",
    ]


NEGATIVE = torch.tensor([[0, 0, 5, 6]])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1] + 1) % 128, 7],
        "num_beams": 2,
    },
    "synced_gpus": {"synced_gpus": False},
    "negative_prompt_ids": {"negative_prompt_ids": NEGATIVE, "guidance_scale": 1.5},
    "negative_prompt_attention_mask": {
        "negative_prompt_ids": NEGATIVE,
        "negative_prompt_attention_mask": (NEGATIVE != 0).long(),
        "guidance_scale": 1.5,
    },
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=5, num_beams=2)},
    "position_ids": {"position_ids": torch.arange(3, 10)[None]},
    "attention_mask": {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1]])},
    "attention_mask of booleans": {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool()},
    "logits_to_keep": {"logits_to_keep": 3},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(9)])},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument_has_its_effect(sharded: Any, unsharded: PreTrainedModel, name: str) -> None:
    length = {} if "generation_config" in ARGUMENTS[name] else {"max_new_tokens": 8}
    arguments = {"inputs": IDS, **length, **ARGUMENTS[name]}
    ours, theirs = (outcome(lambda model=model: model.generate(**arguments)) for model in (sharded, unsharded))
    assert "error" not in theirs
    assert_equal(ours, theirs)


def last_token_twice(model: Any, input_ids: torch.Tensor, stopping_criteria: Any, **arguments: Any) -> torch.Tensor:
    """Decode by a loop of the user's own, which repeats every token."""
    arguments = {name: arguments[name] for name in ("past_key_values", "use_cache")}
    step = input_ids
    while not stopping_criteria(input_ids, None).all():
        token = model(step, **arguments).logits[:, -1:].argmax(-1)
        step = token.repeat(1, 2)
        input_ids = torch.cat([input_ids, step], dim=-1)
    return input_ids


def test_custom_loop(sharded: Any, unsharded: PreTrainedModel) -> None:
    ours, theirs = (
        model.generate(IDS, max_new_tokens=8, custom_generate=last_token_twice) for model in (sharded, unsharded)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding(sharded: Any, unsharded: PreTrainedModel, do_sample: bool) -> None:
    assistant = copy.deepcopy(unsharded)
    for parameter in assistant.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    arguments = {"do_sample": do_sample, "max_new_tokens": 16, "eos_token_id": None, "assistant_model": assistant}
    ours, theirs = (outcome(lambda model=model: model.generate(IDS, **arguments)) for model in (sharded, unsharded))
    assert_equal(ours, theirs)


def test_assistant_with_another_tokenizer(
    sharded: Any, unsharded: PreTrainedModel, tokenizer: Any, other_tokenizer: Any, tmp_path: Path
) -> None:
    assistant = reference(save_tiny("gpt2", torch.float32, tmp_path))
    tokens = [
        model.generate(
            IDS,
            max_new_tokens=12,
            assistant_model=assistant,
            tokenizer=tokenizer,
            assistant_tokenizer=other_tokenizer,
        )
        for model in (sharded, unsharded)
    ]
    assert torch.equal(*tokens)


def test_synced_gpus_without_any(sharded: Any, unsharded: PreTrainedModel) -> None:
    ours, theirs = (
        outcome(lambda model=model: model.generate(IDS, max_new_tokens=3, synced_gpus=True))
        for model in (sharded, unsharded)
    )
    assert "process group" in theirs["error"]
    assert_equal(ours, theirs)


def test_unknown_argument_is_refused_by_name(sharded: Any) -> None:
    with pytest.raises(ll.ArgumentError, match="max_new_token"):
        sharded.generate(IDS, max_new_token=3)
    with pytest.raises(ll.ArgumentError, match="token_type_ids"):
        sharded.generate(IDS, token_type_ids=IDS)


def test_cache_of_another_kind_is_refused(sharded: Any, unsharded: PreTrainedModel) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match="past_key_values is a DynamicCache"):
        sharded.generate(IDS, max_new_tokens=2, past_key_values=unsharded(IDS).past_key_values)


def test_empty_prompts(sharded: Any, unsharded: PreTrainedModel) -> None:
    empty = torch.empty((1, 0), dtype=torch.long)
    for arguments in ({"inputs": empty}, {"input_ids": empty}):
        with pytest.raises(ll.ArgumentError, match="are empty"):
            sharded.generate(**arguments, max_new_tokens=2)
    assert torch.equal(*(model.generate(max_new_tokens=5) for model in (sharded, unsharded)))  # from the first token

"""Encoder-decoder models in real workers give exactly what transformers gives, in every mode of generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import lingualinked as ll
from encoder_decoders import FAMILIES, NUM_LAYERS, reference, save_tiny, sources
from lingualinked.errors import ArgumentError, ClosedError, UncuttableModelError, UnsupportedOperationError

pytestmark = [pytest.mark.process, pytest.mark.equality, pytest.mark.slow]

TOKENS, MASK = sources(3, 11)
LABELS = torch.tensor([[5, 9, 44, 6], [7, 80, 2, -100], [3, -100, -100, -100]])

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a mask": {"attention_mask": None},
    "without KV": {"use_cache": False, "max_new_tokens": 4},
    "beams": {"num_beams": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams of samples": {"do_sample": True, "num_beams": 2},
    "a forced beginning": {"forced_bos_token_id": 7},
    "another start": {"decoder_start_token_id": 5},
    "a prefix": {"decoder_input_ids": torch.tensor([[2, 5, 6], [2, 9, 9], [2, 44, 3]])},
    "prompt lookup": {"input_ids": TOKENS[:1], "attention_mask": MASK[:1], "prompt_lookup_num_tokens": 2},
    "several ends": {"eos_token_id": [2, 9, 33, 60]},
    "processors": {"min_new_tokens": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[ll.Cluster]:
    with ll.Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module", params=FAMILIES)
def both(
    request: pytest.FixtureRequest, cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Any]]:
    folder = save_tiny(request.param, torch.float32, tmp_path_factory.mktemp(request.param))
    with ll.ShardedModel.from_pretrained(folder, cluster=cluster, plan="even", progress=False) as sharded:
        yield reference(folder), sharded


def test_a_saved_model_is_the_checkpoint(both: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    uncut, sharded = both
    sharded.save_pretrained(tmp_path / "ours")
    uncut.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_attentions_of_generation_are_refused_by_name(both: tuple[PreTrainedModel, Any]) -> None:
    with pytest.raises(UnsupportedOperationError, match="output_attentions"):
        both[1].generate(TOKENS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_plan_is_found_by_measuring_and_devices_can_be_left(family: str, cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny(family, torch.float32, tmp_path)
    with ll.ShardedModel.from_pretrained(folder, cluster=cluster, progress=False) as sharded:
        device = sharded.plan.stages[0].device
        sharded.release(device)
        assert device not in {stage.device for stage in sharded.plan.stages}
        arguments = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
        assert torch.equal(call(sharded, **arguments).logits, call(reference(folder), **arguments).logits)


def encode(model: Any, **arguments: Any) -> Any:
    with torch.no_grad():
        return model.get_encoder()(input_ids=TOKENS, attention_mask=MASK, **arguments)


def call(model: Any, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(attention_mask=MASK, **arguments)


def test_every_mode_of_generation_is_exact(both: tuple[PreTrainedModel, Any]) -> None:
    said = []
    for model in both:
        tokens = {}
        for name, arguments in CALLS.items():
            torch.manual_seed(3)
            given = {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": 9, **arguments}
            tokens[name] = model.generate(**given).tolist()
        said.append(tokens)
    assert said[1] == said[0]


def test_what_generation_records_is_exact(both: tuple[PreTrainedModel, Any]) -> None:
    asked = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    whole, cut = (model.generate(TOKENS, attention_mask=MASK, max_new_tokens=4, num_beams=2, **asked) for model in both)
    assert cut.keys() == whole.keys()
    assert torch.equal(cut.sequences, whole.sequences)
    assert all(map(torch.equal, cut.scores, whole.scores))
    assert all(map(torch.equal, cut.encoder_hidden_states, whole.encoder_hidden_states))
    for ours, theirs in zip(cut.decoder_hidden_states, whole.decoder_hidden_states, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_call_with_labels_is_exact(both: tuple[PreTrainedModel, Any]) -> None:
    whole, cut = (call(model, input_ids=TOKENS, labels=LABELS) for model in both)
    assert cut.keys() == whole.keys()
    assert torch.equal(cut.logits, whole.logits)
    assert torch.equal(cut.loss, whole.loss)
    assert torch.equal(cut.encoder_last_hidden_state, whole.encoder_last_hidden_state)


def test_a_text_that_goes_on_is_exact(both: tuple[PreTrainedModel, Any]) -> None:
    logits = []
    for model in both:
        encoded = encode(model)
        first = call(model, encoder_outputs=encoded, decoder_input_ids=LABELS[:, :2].abs() % 97, use_cache=True)
        past = first.past_key_values
        later = call(
            model, encoder_outputs=(encoded[0],), decoder_input_ids=LABELS[:, 2:].abs() % 97, past_key_values=past
        )
        logits.append((first.logits, later.logits))
    assert all(map(torch.equal, *logits))


def test_the_encoder_alone_is_exact(both: tuple[PreTrainedModel, Any]) -> None:
    whole, cut = (encode(model, output_hidden_states=True) for model in both)
    assert torch.equal(cut.last_hidden_state, whole.last_hidden_state)
    assert all(map(torch.equal, cut.hidden_states, whole.hidden_states))


def test_both_stacks_move_in_the_middle_of_a_text(both: tuple[PreTrainedModel, Any]) -> None:
    plans = (
        [("worker-2", 0, 3), ("worker-0", 3, 4)],
        [("worker-1", 0, 1), ("worker-2", 1, 4)],
        [("worker-0", 0, 4)],
    )
    whole, cut = both
    texts = []
    for model in both:
        encoded, past = encode(model), None
        ids = torch.full((3, 1), 5)
        logits = []
        for spans in plans:
            for _ in range(2):
                step = call(model, encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=past, use_cache=True)
                past, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
                logits.append(step.logits)
            if model is cut:
                cut.rebalance(ll.Plan.from_spans(spans))
                assert [(each.device, each.start, each.end) for each in cut.plan.stages] == spans
        texts.append(logits)
    assert all(map(torch.equal, *texts))
    cut.get_encoder().rebalance(ll.Plan.from_spans([("worker-1", 0, NUM_LAYERS["encoder"])]))
    assert torch.equal(encode(cut)[0], encode(whole)[0])


def test_each_stack_is_cut_over_all_devices(both: tuple[PreTrainedModel, Any], cluster: ll.Cluster) -> None:
    whole, cut = both
    assert isinstance(cut, type(whole))
    for plan, num_layers in zip((cut.get_encoder().plan, cut.plan), NUM_LAYERS.values(), strict=True):
        assert plan.stages[-1].end == num_layers
    with ll.ShardedModel.from_pretrained(
        cut.name_or_path, cluster=cluster, plan=(cut.get_encoder().plan, ll.Plan.from_spans([("worker-1", 0, 4)]))
    ) as placed:
        assert placed.plan.devices == ("worker-1",)


def test_the_plan_is_found_by_measuring(cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("bart", torch.bfloat16, tmp_path)
    with ll.ShardedModel.from_pretrained(folder, cluster=cluster, progress=False) as sharded:
        assert sharded.profile is not None
        tokens = sharded.generate(TOKENS, attention_mask=MASK, max_new_tokens=5)
        assert torch.equal(tokens, reference(folder).generate(TOKENS, attention_mask=MASK, max_new_tokens=5))


def test_what_is_not_supported_is_refused_by_name(both: tuple[PreTrainedModel, Any]) -> None:
    _, cut = both
    with pytest.raises(UnsupportedOperationError, match="cache_implementation='static'"):
        cut.generate(TOKENS, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UnsupportedOperationError, match="num_microbatches"):
        cut.generate(TOKENS, max_new_tokens=2, num_microbatches=2)
    with pytest.raises(UnsupportedOperationError, match="output_attentions"):
        call(cut, input_ids=TOKENS, labels=LABELS, output_attentions=True)
    with pytest.raises(UnsupportedOperationError, match=r"load_adapter\(\)"):
        cut.load_adapter("an adapter")
    with pytest.raises(ArgumentError, match="attention_mask of shape"):
        cut(input_ids=TOKENS, attention_mask=MASK[:, :-1], labels=LABELS, encoder_outputs=encode(cut))
    with pytest.raises(ArgumentError, match="encoder_outputs of shape"):
        call(cut, encoder_outputs=(torch.zeros(3, 4, 31),), labels=LABELS)


def test_an_encoder_does_not_outlive_its_model(cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("t5", torch.float32, tmp_path)
    with ll.ShardedModel.from_pretrained(folder, cluster=cluster, plan="even", progress=False) as sharded:
        encoder: Any = sharded.get_encoder()  # type: ignore[attr-defined]
    with pytest.raises(ClosedError):
        encoder(input_ids=TOKENS)


def test_an_architecture_that_no_test_has_shown_is_refused(cluster: ll.Cluster, tmp_path: Path) -> None:
    from transformers import ProphetNetConfig

    ProphetNetConfig().save_pretrained(tmp_path)
    with pytest.raises(UncuttableModelError, match="prophetnet"):
        ll.ShardedModel.from_pretrained(tmp_path, cluster=cluster, load_format="dummy")

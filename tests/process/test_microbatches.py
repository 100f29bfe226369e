"""A batch that runs as microbatches gives what the uncut model gives for them, and for the whole batch where rows are independent."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import lingualinked as ll
from lingualinked.telemetry.perfetto import trace_of
from process.conftest import load_unsharded, save_random

pytestmark = pytest.mark.process

NUM_ROWS, NUM_NEW = 8, 4
SPANS = [("a", 0, 2), ("b", 2, 3)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        eos_token_id=None,
        pad_token_id=0,
    )
    return save_random(config, tmp_path_factory.mktemp("microbatches"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sharded(shared_cluster: ll.Cluster, path: str) -> Iterator[Any]:
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(path, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model


@pytest.fixture(scope="module")
def uncut(path: str) -> Iterator[PreTrainedModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers
    yield load_unsharded(path)
    torch.set_num_threads(before)


def prompts(num_tokens: int = 6) -> Tensor:
    return torch.randint(1, 96, (NUM_ROWS, num_tokens), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: Tensor, **arguments: Any) -> Any:
    torch.manual_seed(0)
    whole = {"output_logits": True, "return_dict_in_generate": True, **arguments}
    return model.generate(ids, max_new_tokens=NUM_NEW, **{"do_sample": False, **whole})


def halves(model: Any, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Generate with the rows of each half alone; tokens and logits of all."""
    results = [generate(model, half, **arguments) for half in ids.chunk(2)]
    logits = [torch.stack(result.logits) for result in results]
    return torch.cat([result.sequences for result in results]), torch.cat(logits, dim=1)


def test_each_microbatch_gets_what_it_would_get_alone(sharded: Any, uncut: PreTrainedModel) -> None:
    ids = prompts()
    result = generate(sharded, ids, num_microbatches=2)
    sequences, logits = halves(uncut, ids)
    assert torch.equal(result.sequences, sequences)
    assert torch.equal(torch.stack(result.logits), logits)
    assert result.past_key_values.num_microbatches == 2


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_where_rows_are_independent_the_whole_batch_is_met(
    sharded: Any, uncut: PreTrainedModel, arguments: dict[str, Any]
) -> None:
    if not 0 < sharded.independent_rows <= NUM_ROWS // 3:
        pytest.skip("rows of a batch depend on each other here")
    result, whole = (
        generate(model, prompts(), **arguments, **split)
        for model, split in ((sharded, {"num_microbatches": 3}), (uncut, {}))
    )
    assert torch.equal(result.sequences, whole.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(whole.logits))


@pytest.mark.parametrize("arguments", [{}, {"eos_token_id": [7, 30, 41]}, {"repetition_penalty": 1.3}], ids=str)
def test_microbatches_go_on_by_themselves(sharded: Any, uncut: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Without logits for the caller, each has a run of its own; rows that have ended are padded until all have."""
    call = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, **arguments}
    ours = sharded.generate(prompts(), num_microbatches=2, **call)
    parts = [uncut.generate(half, **call).sequences for half in prompts().chunk(2)]
    length = max(part.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, length - part.shape[1])) for part in parts]
    assert torch.equal(ours.sequences, torch.cat(padded))
    held = {each.num_tokens for each in ours.past_key_values.session.microbatches}
    assert held == {ours.sequences.shape[1] - 1}
    ended = torch.tensor([len(set(row) & {7, 30, 41}) > 0 for row in ours.sequences[:, 6:].tolist()])
    assert "eos_token_id" not in arguments or ended.sum() > 0


def test_microbatches_share_the_random_numbers_of_the_batch(sharded: Any, uncut: PreTrainedModel) -> None:
    if not 0 < sharded.independent_rows <= NUM_ROWS // 2:
        pytest.skip("rows of a batch depend on each other here")
    call = {"do_sample": True, "max_new_tokens": 8, "top_k": 20}
    results, states = [], []
    for model, split in ((sharded, {"num_microbatches": 2}), (uncut, {})):
        torch.manual_seed(5)
        results.append(model.generate(prompts(), **call, **split))
        states.append(torch.get_rng_state())
    assert torch.equal(*results)
    assert torch.equal(*states)


def test_a_batch_is_split_where_that_changes_no_bit(
    sharded: Any, uncut: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded._pipeline, "latest_steps", list)  # without times, a rule decides
    call = {"do_sample": False, "max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    result = sharded.generate(prompts(), **call)
    is_exact = 0 < sharded.independent_rows <= NUM_ROWS // 2
    assert result.past_key_values.num_microbatches == (2 if is_exact else 1)
    assert torch.equal(result.sequences, uncut.generate(prompts(), **call).sequences)
    # Where steps wait for each other, nothing says here that more microbatches are faster.
    assert generate(sharded, prompts()).past_key_values.num_microbatches == 1


def test_what_layers_record_comes_of_all_rows(sharded: Any, uncut: PreTrainedModel) -> None:
    asked = {"output_hidden_states": True, "output_attentions": True}
    ours = generate(sharded, prompts(), num_microbatches=2, **asked)
    parts = [generate(uncut, half, **asked) for half in prompts().chunk(2)]
    for name in ("hidden_states", "attentions"):
        for step, layers in enumerate(getattr(ours, name)):
            theirs = zip(*(getattr(part, name)[step] for part in parts), strict=True)
            assert all(torch.equal(layer, torch.cat(each)) for layer, each in zip(layers, theirs, strict=True)), name


@pytest.mark.parametrize("arguments", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_without_kv_and_with_kv_of_a_fixed_size(
    sharded: Any, uncut: PreTrainedModel, arguments: dict[str, Any]
) -> None:
    result = generate(sharded, prompts(), num_microbatches=2, **arguments)
    assert torch.equal(result.sequences, halves(uncut, prompts(), **arguments)[0])


def test_telemetry_says_which_microbatch_a_step_was_of(sharded: Any) -> None:
    generate(sharded, prompts(), num_microbatches=2)
    steps = sharded.telemetry.history.steps[-2 * NUM_NEW :]
    assert sorted(step.microbatch for step in steps) == NUM_NEW * [0] + NUM_NEW * [1]
    assert {step.rows for step in steps} == {NUM_ROWS // 2}
    names = {event["name"] for event in trace_of(sharded.telemetry.history)["traceEvents"]}
    assert {"prefill, microbatch 0", "decode, microbatch 1"} <= names


def test_a_padded_batch_and_its_embeddings(sharded: Any, uncut: PreTrainedModel) -> None:
    mask = torch.ones(NUM_ROWS, 6, dtype=torch.long)
    mask[1, :3] = mask[6, :2] = 0
    embeddings = uncut.get_input_embeddings()(prompts()).detach()
    ours = generate(sharded, None, inputs_embeds=embeddings, attention_mask=mask, num_microbatches=2)
    theirs = [
        generate(uncut, None, inputs_embeds=each, attention_mask=own)
        for each, own in zip(embeddings.chunk(2), mask.chunk(2), strict=True)
    ]
    assert torch.equal(ours.sequences, torch.cat([each.sequences for each in theirs]))


def test_a_user_s_loop_goes_on_with_the_kv(sharded: Any, uncut: PreTrainedModel) -> None:
    """Crop it, copy it, repeat and select rows within microbatches: all of these stay split, and equal."""
    past = generate(sharded, prompts(), num_microbatches=2).past_key_values
    others = [generate(uncut, half).past_key_values for half in prompts().chunk(2)]
    copied = copy.deepcopy(past)
    for each, repeats in ((past, 1), (copied, 2)):
        each.crop(-2)
        each.batch_repeat_interleave(repeats)
        assert each.num_microbatches == 2
        theirs = [copy.deepcopy(other) for other in others]
        for other in theirs:
            other.crop(-2)
            other.batch_repeat_interleave(repeats)
        assert torch.equal(following(sharded, each, NUM_ROWS * repeats), following(uncut, theirs, NUM_ROWS * repeats))
    past.reset()
    assert past.num_microbatches == 2


def test_rows_change_places_across_microbatches(sharded: Any, uncut: PreTrainedModel) -> None:
    past = generate(sharded, prompts(), num_microbatches=2).past_key_values
    others = [generate(uncut, half).past_key_values for half in prompts().chunk(2)]
    order = torch.tensor([5, 1, 0, 7, 2, 2])
    past.reorder_cache(order)
    assert past.num_microbatches == 1
    assert past.batch_size == len(order)
    joined = joined_kv(others)
    joined.reorder_cache(order)
    assert torch.equal(following(sharded, past, len(order)), following(uncut, [joined], len(order)))


def test_a_hook_sees_the_whole_batch(sharded: Any, uncut: PreTrainedModel) -> None:
    """One that is registered between two steps makes one session of the microbatches."""
    past = generate(sharded, prompts(), num_microbatches=2).past_key_values
    others = [generate(uncut, half).past_key_values for half in prompts().chunk(2)]
    seen: list[Tensor] = []
    handle = sharded.model.layers[1].register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        logits = following(sharded, past, NUM_ROWS)
    finally:
        handle.remove()
    assert [len(each) for each in seen] == [NUM_ROWS]
    assert torch.equal(logits, following(uncut, [joined_kv(others)], NUM_ROWS))


def test_layers_move_while_a_batch_is_split(sharded: Any) -> None:
    before = generate(sharded, prompts(), num_microbatches=2)
    spans = iter(([("a", 0, 1), ("b", 1, 3)], SPANS))

    def move(ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        if ids.shape[1] in (8, 9):
            sharded.rebalance(ll.Plan.from_spans(next(spans)))
        return torch.zeros(len(ids), dtype=torch.bool)

    moved = generate(sharded, prompts(), num_microbatches=2, stopping_criteria=[move])
    assert sharded.plan.spans == tuple(SPANS)
    assert torch.equal(moved.sequences, before.sequences)
    assert torch.equal(torch.stack(moved.logits), torch.stack(before.logits))


def test_all_microbatches_fit_the_kv_budget_or_none_runs(shared_cluster: ll.Cluster, path: str) -> None:
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(
        path, cluster=shared_cluster, plan=plan, max_kv_tokens=NUM_ROWS * 8, progress=False
    ) as model:
        past = model.generate(
            prompts(), max_new_tokens=2, do_sample=False, num_microbatches=2, return_dict_in_generate=True
        ).past_key_values
        with pytest.raises(ll.KVCapacityError):
            model(torch.ones(NUM_ROWS, 2, dtype=torch.long), past_key_values=past)
        assert model(torch.ones(NUM_ROWS, 1, dtype=torch.long), past_key_values=past).logits.shape[0] == NUM_ROWS


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", NUM_ROWS + 1])
def test_a_number_that_can_t_be_met_is_refused(sharded: Any, number: object) -> None:
    with pytest.raises(ll.ArgumentError, match=f"num_microbatches={number!r}"):
        sharded.generate(prompts(), max_new_tokens=1, num_microbatches=number)


def test_kv_that_is_held_already_is_not_split_anew(sharded: Any) -> None:
    result = generate(sharded, prompts(), num_microbatches=2)
    kept = {"past_key_values": result.past_key_values, "do_sample": False, "max_new_tokens": 1}
    with pytest.raises(ll.ArgumentError, match="num_microbatches=3"):
        sharded.generate(result.sequences, num_microbatches=3, **kept)
    assert sharded.generate(result.sequences, num_microbatches=2, **kept).shape == (NUM_ROWS, 6 + NUM_NEW + 1)


@torch.no_grad()
def following(model: Any, past: Any, num_rows: int) -> Tensor:
    """Logits of one more token of each row; of an uncut model with a KV cache for each part of the rows."""
    ids = torch.arange(num_rows).unsqueeze(1) % 90 + 1
    if not isinstance(past, list):
        return model(ids, past_key_values=past).logits
    parts = zip(ids.chunk(len(past)), past, strict=True)
    return torch.cat([model(own, past_key_values=each).logits for own, each in parts])


def joined_kv(parts: list[Any]) -> Any:
    """Return a KV cache of transformers with the rows of several."""
    joined = copy.deepcopy(parts[0])
    for index, layer in enumerate(joined.layers):
        layer.keys = torch.cat([part.layers[index].keys for part in parts])
        layer.values = torch.cat([part.layers[index].values for part in parts])
    return joined

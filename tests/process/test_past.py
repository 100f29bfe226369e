"""``past_key_values`` is handled as transformers' own: filled in place, copied, edited; what it refuses leaves it as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

import accelerators
import lingualinked as ll
from accelerators import moved
from families import reference, save_tiny
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93], [1, 5, 6, 7, 8, 9, 10]])
NEXT = torch.tensor([[11, 12], [13, 14]])


@pytest.fixture(scope="module", params=["gpt2", "mistral"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, PreTrainedModel]]:
    """A family that attends to all tokens and one with a sliding window, sharded and not."""
    folder = save_tiny(request.param, torch.bfloat16, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("a", 3, 4)])
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model, reference(folder)


@torch.no_grad()
def step(model: Any, ids: torch.Tensor, past: Any, **arguments: Any) -> torch.Tensor:
    return model(ids, past_key_values=past, **arguments).logits


# --- an empty one


def test_a_chat_fills_the_users_cache_turn_by_turn(pair: tuple[Any, PreTrainedModel]) -> None:
    said = []
    for model in pair:
        cache, text = DynamicCache(config=model.config), IDS[:1]
        said.append([])
        for turn in range(3):
            text = torch.cat([text, torch.tensor([[20 + turn, 30]])], dim=1)
            text = model.generate(text, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
            said[-1].append((text.tolist(), cache.get_seq_length()))
        assert isinstance(cache, DynamicCache)
    assert said[0] == said[1]


def test_forward_fills_the_users_cache(pair: tuple[Any, PreTrainedModel]) -> None:
    logits = []
    for model in pair:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            output = model(IDS, past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        logits.append((output.logits, step(model, NEXT, cache)))
        assert cache.get_seq_length() == 9
    assert all(map(torch.equal, *logits))


def test_an_empty_cache_records_its_past_if_it_was_told_to(pair: tuple[Any, PreTrainedModel]) -> None:
    logits = []
    for model in pair:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        step(model, IDS, cache)
        cache.crop(-3)
        logits.append(step(model, NEXT, cache))
    assert torch.equal(*logits)


def test_an_empty_cache_without_layers(sharded: Any, unsharded: PreTrainedModel) -> None:
    assert torch.equal(*(step(model, IDS, DynamicCache()) for model in (sharded, unsharded)))


def test_a_cache_that_is_no_empty_one_is_refused_as_it_was(sharded: Any, unsharded: PreTrainedModel) -> None:
    class Own(DynamicCache):
        pass

    filled = unsharded(IDS).past_key_values
    sliding = DynamicCache(config=copy.deepcopy(unsharded.config))
    sliding.layers[0] = DynamicCache(config=sliding_config(unsharded)).layers[0]
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for cache, words in {
        filled: "already holds KV",
        sliding: "whose layers differ",
        both: "is a EncoderDecoderCache",
        Own(): "is a Own",
    }.items():
        kind = type(cache)
        for arguments in ({}, {"max_new_tokens": 2}):
            use = sharded.generate if arguments else sharded
            with pytest.raises(ll.UnsupportedOperationError, match=f"past_key_values .*{words}"):
                use(IDS, past_key_values=cache, **arguments)
        assert type(cache) is kind
    assert filled.get_seq_length() == 7


def sliding_config(model: PreTrainedModel) -> Any:
    config = copy.deepcopy(model.config)
    config.sliding_window = 4
    return config


def test_a_cache_without_layers_is_refused_where_some_slide(pair: tuple[Any, PreTrainedModel]) -> None:
    if pair[0].config.model_type == "mistral":
        with pytest.raises(ll.UnsupportedOperationError, match=r"DynamicCache\(config=model\.config\)"):
            pair[0](IDS, past_key_values=DynamicCache())


# --- copies


def test_a_prefix_is_run_once_and_copied_for_each_prompt(pair: tuple[Any, PreTrainedModel]) -> None:
    said = []
    for model in pair:
        with torch.no_grad():
            prefix = model(IDS[:1], past_key_values=DynamicCache(config=model.config)).past_key_values
        said.append([])
        for prompt in NEXT:
            text = torch.cat([IDS[:1], prompt[None]], dim=1)
            own = copy.deepcopy(prefix)
            said[-1].append(model.generate(text, past_key_values=own, max_new_tokens=5, do_sample=False).tolist())
            assert prefix.get_seq_length() == 7
    assert said[0] == said[1]


def test_a_copy_and_what_it_is_of_go_on_by_themselves(pair: tuple[Any, PreTrainedModel]) -> None:
    seen = []
    for model in pair:
        past = DynamicCache(config=model.config)
        past.activate_past_recording()
        step(model, IDS, past, attention_mask=(IDS != 1).long())
        past.crop(-1)  # reaches the stages with the next step of each
        other = copy.deepcopy(past)
        past.reorder_cache(torch.tensor([1, 1]))
        mask = torch.cat([(IDS != 1).long()[:, :6], torch.ones_like(NEXT)], dim=1)
        logits = [step(model, NEXT, other, attention_mask=mask)]
        logits.append(step(model, NEXT, past, attention_mask=mask[[1, 1]]))
        third = copy.deepcopy(other)
        del other
        third.crop(-2)
        logits += [step(model, NEXT.flip(0), third, attention_mask=mask), step(model, NEXT, past)]
        seen.append(logits)
    assert all(map(torch.equal, *seen))


def test_a_copy_of_outputs_copies_their_past(sharded: Any, unsharded: PreTrainedModel) -> None:
    logits = []
    for model in (sharded, unsharded):
        with torch.no_grad():
            output = model(IDS)
        other = copy.deepcopy(output)
        step(model, NEXT, output.past_key_values)
        logits.append(step(model, NEXT.flip(0), other.past_key_values))
    assert torch.equal(*logits)


def test_copies_go_on_after_a_migration(place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    with torch.no_grad():
        past, theirs = model(IDS).past_key_values, unsharded(IDS).past_key_values
    before, before_theirs = copy.deepcopy(past), copy.deepcopy(theirs)
    model.rebalance(ll.Plan.from_spans([("b", 0, 1), ("c", 1, 4)]))
    after, after_theirs = copy.deepcopy(past), copy.deepcopy(theirs)
    for ours, other in ((before, before_theirs), (after, after_theirs), (past, theirs)):
        assert torch.equal(step(model, NEXT, ours), step(unsharded, NEXT, other))


def test_a_copy_counts_in_the_budget(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 4)], max_kv_tokens=30)
    past = model(IDS).past_key_values
    other = copy.deepcopy(past)
    with pytest.raises(ll.KVCapacityError, match="14 tokens of KV for this session and 28 of others"):
        copy.deepcopy(past)
    assert step(model, NEXT[:, :1], past).shape == (2, 1, 128)
    with pytest.raises(ll.KVCapacityError):
        step(model, NEXT[:, :1], other)
    del past
    assert step(model, NEXT, other).shape == (2, 2, 128)


def test_a_copy_counts_what_the_stages_copy(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 4)], max_kv_tokens=40)
    past = model(IDS).past_key_values
    past.crop(-5)  # which reaches the stages with the next step
    other = copy.deepcopy(past)
    with pytest.raises(ll.KVCapacityError, match="14 tokens of KV for this session and 28 of others"):
        model(IDS)
    assert step(model, NEXT, other).shape == (2, 2, 128)
    assert model(IDS).logits.shape == (2, 7, 128)
    assert step(model, NEXT, past).shape == (2, 2, 128)


def test_nothing_is_left_of_copies(sharded: Any) -> None:
    past = sharded(IDS).past_key_values
    copies = [copy.deepcopy(past) for _ in range(3)]
    wait_until(lambda: num_sessions(sharded) == [4, 4, 4])
    del past, copies
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_what_has_ended_is_not_copied(sharded: Any) -> None:
    past = sharded(IDS).past_key_values
    past.end()
    with pytest.raises(ll.ClosedError, match="past_key_values=None"):
        copy.deepcopy(past)
    assert copy.deepcopy(DynamicCache(config=sharded.config)).get_seq_length() == 0


# --- edits

VALUES: dict[str, list[Any]] = {
    "reorder_cache": [
        torch.tensor([5, 5]),
        torch.tensor([-1, 0]),
        torch.tensor([1, 0]),
        torch.tensor([1, 1, 0], dtype=torch.int32),
        torch.tensor([], dtype=torch.long),
        torch.tensor([[0, 1]]),
        torch.tensor(1),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        [1, 0],
        None,
    ],
    "crop": [-1, -7, -8, 0, 1, -2.0, True, None, "1", torch.tensor(-1), torch.tensor([-1, -2]), np.int64(-2)],
    "batch_repeat_interleave": [0, 1, 3, -1, 1.5, None, True, torch.tensor([1, 2]), torch.tensor([1, 2, 3]), [2]],
    "batch_select_indices": [
        torch.tensor([1]),
        torch.tensor([-1, 0]),
        torch.tensor([2]),
        torch.tensor([True, False]),
        torch.tensor([True, False, True]),
        torch.tensor([False, False]),
        torch.tensor([[0, 1]]),
        torch.tensor([0.0]),
        [1, 0],
        slice(1),
        0,
        5,
        None,
        "rows",
    ],
}
WITHOUT_VALUES = ("activate_past_recording", "reset")
REFUSED = {
    "early_initialization": (2, 2, 8, torch.float32, "cpu"),
    "offload": (0,),
    "prefetch": (0,),
    "update": (torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0),
    "update_conv_state": (torch.zeros(1), 0),
    "update_indexer": (torch.zeros(1), 0),
    "update_recurrent_state": (torch.zeros(1), 0),
}
QUERIES = """get_conv_state get_mask_sizes get_max_length get_query_offset get_recurrent_state get_seq_length has_previous_state
    is_recording_past""".split()


def test_each_method_of_a_cache_is_accounted_for() -> None:
    methods = {name for name in dir(DynamicCache) if not name.startswith("_") and callable(getattr(Cache, name))}
    assert methods == {*VALUES, *WITHOUT_VALUES, *REFUSED, *QUERIES}


@pytest.mark.parametrize("name", REFUSED)
def test_what_writes_kv_here_is_refused(sharded: Any, name: str) -> None:
    past = sharded(IDS).past_key_values
    with pytest.raises(ll.UnsupportedOperationError, match="sharded KV cache"):
        getattr(past, name)(*REFUSED[name])


@pytest.mark.parametrize("name", [*VALUES, *WITHOUT_VALUES])
@pytest.mark.parametrize("is_empty", [False, True])
def test_each_edit_has_its_effect_or_leaves_the_past_as_it_was(
    sharded: Any, unsharded: PreTrainedModel, name: str, is_empty: bool
) -> None:
    pasts = [DynamicCache(config=unsharded.config) for _ in range(2)]
    if is_empty:
        pasts[0] = sharded(IDS).past_key_values
        pasts[0].reset()
    else:
        for model, past in zip((sharded, unsharded), pasts, strict=True):
            step(model, IDS, past)
    for arguments in [(value,) for value in VALUES[name]] if name in VALUES else [()]:
        ours, theirs = map(copy.deepcopy, pasts)
        try:
            getattr(ours, name)(*arguments)
        except ll.LingualinkedError:
            pass
        else:
            getattr(theirs, name)(*moved(arguments, accelerators.chosen))
        assert ours.get_seq_length() == theirs.get_seq_length()
        num_rows = 2 if is_empty else len(theirs.layers[0].keys if theirs.layers[0].is_initialized else IDS)
        ids = NEXT[:1].repeat(num_rows, 1)
        assert torch.equal(step(sharded, ids, ours), step(unsharded, ids, theirs)), arguments


def test_edits_of_a_full_window_leave_the_past_as_it_was(place: Callable[..., Any], tmp_path: Path) -> None:
    folder = str(save_tiny("mistral", torch.float32, tmp_path))
    model, unsharded = place(folder, [("a", 0, 4)]), reference(Path(folder))
    with torch.no_grad():
        ours, theirs = model(IDS).past_key_values, unsharded(IDS).past_key_values
    for num_removed in (0, -1):
        with pytest.raises(ll.ArgumentError, match="activate_past_recording"):
            ours.crop(num_removed)
        with pytest.raises(RuntimeError):
            copy.deepcopy(theirs).crop(num_removed)
    assert torch.equal(step(model, NEXT, ours), step(unsharded, NEXT, theirs))

"""Static KV caches, ``cache_implementation="static"`` or a user's own, give what the unsharded model gives with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

import accelerators
import lingualinked as ll
from families import reference, save_tiny
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
BATCH = torch.tensor([[0, 0, 1, 17, 93, 54], [1, 5, 6, 7, 8, 9], [0, 1, 11, 45, 45, 3]])
PADDED = {"inputs": BATCH, "attention_mask": (BATCH != 0).long()}
SPANS = [("a", 0, 1), ("b", 1, 3), ("a", 3, 4)]

Pair = tuple[Any, PreTrainedModel]


@pytest.fixture(params=["llama", "gemma2"])
def pair(request: pytest.FixtureRequest, place: Callable[..., Any], tmp_path: Path) -> Pair:
    """A family that attends to all tokens and one whose every other layer has a sliding window; both new, in bfloat16."""
    folder = save_tiny(request.param, torch.bfloat16, tmp_path)
    return place(folder, SPANS), reference(folder)


def generate(model: Any, **arguments: Any) -> Any:
    torch.manual_seed(7)
    inputs = {"inputs": IDS, "max_new_tokens": 12, "eos_token_id": None, "cache_implementation": "static", **arguments}
    if inputs["cache_implementation"] is None:
        del inputs["cache_implementation"]
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))


@torch.no_grad()
def step(model: Any, ids: torch.Tensor, past: Any, **arguments: Any) -> torch.Tensor:
    return model(ids, past_key_values=past, **arguments).logits


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "a padded batch": PADDED,
    "a padded batch, in beams": {**PADDED, "num_beams": 2},
    "a prompt in chunks": {"prefill_chunk_size": 3},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "longer than needed": {"max_cache_len": 50},
    "by a deprecated name": {"cache_implementation": "hybrid_chunked"},
    "uncompiled": {"disable_compile": True},
    "without KV": {"use_cache": False},
    "guidance": {"guidance_scale": 1.5},
}


def test_each_way_to_generate(pair: Pair) -> None:
    for mode, arguments in MODES.items():
        ours, theirs = (generate(model, **arguments) for model in pair)
        assert_equal(ours, theirs)
        if "use_cache" not in arguments:
            assert isinstance(ours.past_key_values, StaticCache), mode
            assert ours.past_key_values.get_max_length() == theirs.past_key_values.get_max_length()
            assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


def test_it_is_asked_for_in_a_configuration(pair: Pair) -> None:
    kinds = []
    for kind in ("static", "hybrid"):  # transformers takes the second one, as checkpoints have it, for the default
        config = GenerationConfig(cache_implementation=kind, max_new_tokens=5)
        outputs = [
            model.generate(IDS, generation_config=config, return_dict_in_generate=True, output_logits=True)
            for model in pair
        ]
        assert_equal(*outputs)
        kinds.append([isinstance(each.past_key_values, StaticCache) for each in outputs])
    assert kinds == [[True, True], [False, False]]
    for model in pair:
        model.generation_config.cache_implementation = "static"
    outputs = [generate(model, cache_implementation=None) for model in pair]
    assert_equal(*outputs)
    assert all(isinstance(each.past_key_values, StaticCache) for each in outputs)


def test_its_length_stays_as_long_as_it_was(sharded: Any, unsharded: PreTrainedModel) -> None:
    """As transformers keeps it from call to call, since other lengths may shift the last bits."""
    seen = []
    for model in (sharded, unsharded):
        outputs = [generate(model, max_new_tokens=number) for number in (3, 30, 5)]
        seen.append([each.past_key_values.get_max_length() for each in outputs])
        assert torch.equal(outputs[0].sequences, outputs[1].sequences[:, :10])
    assert seen[0] == seen[1]
    assert seen[0][1] == seen[0][2]


def test_it_differs_from_a_growing_one(sharded: Any, unsharded: PreTrainedModel) -> None:
    """Else these tests would show nothing."""
    static, growing = (generate(unsharded, cache_implementation=kind) for kind in ("static", None))
    assert not all(map(torch.equal, static.logits, growing.logits))
    assert_equal(generate(sharded), static)
    assert_equal(generate(sharded, cache_implementation=None), growing)


class Streamed:
    """A streamer that records tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_tokens_are_streamed(sharded: Any, unsharded: PreTrainedModel) -> None:
    ours, theirs = Streamed(), Streamed()
    generate(sharded, streamer=ours)
    generate(unsharded, streamer=theirs)
    assert ours.tokens == theirs.tokens


def test_what_was_returned_goes_on_in_a_later_call(pair: Pair) -> None:
    ours, theirs = (generate(model, max_new_tokens=4, max_cache_len=24) for model in pair)
    for _ in range(2):
        ours, theirs = (
            generate(
                model,
                inputs=torch.cat([output.sequences, IDS[:, :2]], dim=1),
                past_key_values=output.past_key_values,
                max_new_tokens=4,
                cache_implementation=None,
            )
            for model, output in zip(pair, (ours, theirs), strict=True)
        )
        assert_equal(ours, theirs)


def test_a_chat_fills_the_users_cache_turn_by_turn(pair: Pair) -> None:
    said = []
    for model in pair:
        cache, text = StaticCache(config=model.config, max_cache_len=32), IDS
        said.append([])
        for turn in range(3):
            text = torch.cat([text, torch.tensor([[20 + turn, 30]])], dim=1)
            text = model.generate(text, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
            said[-1].append((text.tolist(), int(cache.get_seq_length())))
        assert isinstance(cache, StaticCache)
        assert not isinstance(cache, DynamicCache)
    assert said[0] == said[1]


def test_forward_by_hand(pair: Pair) -> None:
    seen = []
    mask = (BATCH != 0).long()
    for model in pair:
        cache = StaticCache(config=model.config, max_cache_len=np.int64(16))
        assert (cache.batch_size, cache.is_initialized, cache.get_seq_length()) == (-1, False, 0)
        with torch.no_grad():
            output = model(BATCH, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        assert (cache.get_max_length(), cache.get_max_length(1), len(cache)) == (16, 16, 4)
        logits = [output.logits]
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        now = torch.cat([mask[[2, 0, 0]], mask.new_ones(3, 3)], dim=1)
        logits.append(step(model, BATCH[:, 3:], cache, attention_mask=now))
        fork = copy.deepcopy(cache)
        assert isinstance(fork, StaticCache)
        wide = torch.nn.functional.pad(now, (0, 7), value=1)  # as wide as the cache
        logits.append(step(model, BATCH[:, :1], cache, attention_mask=wide))
        four = torch.ones(3, 1, 2, 16, dtype=torch.bool).tril(9)
        if model.config.model_type == "llama":  # no mask of this shape is for sliding windows too
            logits.append(step(model, BATCH[:, 4:], fork, attention_mask=four))
        logits.append(step(model, BATCH[:, 1:2], cache))
        assert (cache.batch_size, int(cache.get_seq_length()), cache.is_croppable) == (3, 11, False)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        logits.append(step(model, BATCH, cache, attention_mask=mask))
        cache.activate_past_recording()
        seen.append(logits)
    assert all(map(torch.equal, *seen))


def test_a_step_that_exceeds_the_length_is_refused_and_nothing_is_lost(pair: Pair) -> None:
    caches = [StaticCache(config=model.config, max_cache_len=9) for model in pair]
    for model, cache in zip(pair, caches, strict=True):
        step(model, IDS, cache)
    with pytest.raises(
        ll.ArgumentError, match=r"3 tokens per row after 7 exceeds max_cache_len=9 .* longer StaticCache"
    ):
        step(pair[0], IDS[:, :3], caches[0])
    assert torch.equal(*(step(model, IDS[:, :2], cache) for model, cache in zip(pair, caches, strict=True)))
    with pytest.raises(ll.ArgumentError, match="after 9 exceeds max_cache_len=9"):
        pair[0].generate(torch.cat([IDS, IDS], dim=1), past_key_values=caches[0], max_new_tokens=1)
    if accelerators.chosen == "cpu":  # on a GPU, an index beyond a tensor can't be survived
        with pytest.raises(IndexError):
            step(pair[1], IDS[:, :1], caches[1])
    with pytest.raises(ll.ArgumentError, match="7 tokens per row after 0 exceeds max_cache_len=5"):
        step(pair[0], IDS, StaticCache(config=pair[0].config, max_cache_len=5))


def test_what_static_layers_can_not_do_is_refused_by_name(sharded: Any, unsharded: PreTrainedModel) -> None:
    pasts = [StaticCache(config=unsharded.config, max_cache_len=16) for _ in range(2)]
    for model, past in zip((sharded, unsharded), pasts, strict=True):
        step(model, IDS, past)
    for name, value in {
        "crop": -1,
        "batch_repeat_interleave": 2,
        "batch_select_indices": torch.tensor([0]),
    }.items():
        with pytest.raises(ll.UnsupportedOperationError, match=rf"{name}\(.*static KV cache"):
            getattr(pasts[0], name)(value)
        with pytest.raises(AttributeError):
            getattr(pasts[1], name)(value)
    past = StaticCache(config=unsharded.config, max_cache_len=30)
    for arguments in ({"cache_implementation": "static"}, {"past_key_values": past}):
        arguments |= {"max_new_tokens": 8, "prompt_lookup_num_tokens": 2}
        with pytest.raises(ll.UnsupportedOperationError, match="assisted decoding with a static KV cache"):
            sharded.generate(IDS, **arguments)
        with pytest.raises(ValueError, match="not supported with Static cache"):
            unsharded.generate(IDS, **arguments)
    with pytest.raises(ValueError, match="Passing both"):
        sharded.generate(IDS, past_key_values=past, cache_implementation="static", max_new_tokens=2)
    assert type(past) is StaticCache


def test_its_methods_are_those_of_a_growing_one() -> None:
    """Each of which has a test, here or in test_past.py."""
    names = [{name for name in dir(kind) if not name.startswith("_")} for kind in (StaticCache, DynamicCache)]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["early_initialization", "get_mask_sizes", "offload", "update"])
def test_what_needs_its_layers_is_refused(sharded: Any, name: str) -> None:
    past = StaticCache(config=sharded.config, max_cache_len=16)
    step(sharded, IDS, past)
    arguments = {
        "early_initialization": (1, 2, 8, torch.float32, "cpu"),
        "get_mask_sizes": (1, 0),
        "offload": (0,),
        "update": (torch.zeros(1), torch.zeros(1), 0),
    }
    with pytest.raises(ll.UnsupportedOperationError, match="sharded KV cache"):
        getattr(past, name)(*arguments[name])
    assert not past.is_compileable


def refused_caches(unsharded: PreTrainedModel) -> Iterator[tuple[StaticCache, str]]:
    config = unsharded.config
    filled = StaticCache(config=config, max_cache_len=16)
    step(unsharded, IDS, filled)
    yield filled, "already holds KV"
    early = StaticCache(config=config, max_cache_len=16)
    early.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    yield early, "or room for it"
    yield StaticCache(config=config, max_cache_len=16, offloading=True), "offloading StaticCache"
    other = copy.deepcopy(config)
    other.num_hidden_layers = 3
    yield StaticCache(config=other, max_cache_len=16), "layers differ from the model's"
    other = copy.deepcopy(config)
    other.sliding_window = 4
    yield StaticCache(config=other, max_cache_len=16), "layers differ from the model's"
    for length in (0, -1, 2.5, 2**63):
        yield StaticCache(config=config, max_cache_len=length), f"max_cache_len={length} .* must be an integer"


def test_another_cache_is_refused_as_it_was(sharded: Any, unsharded: PreTrainedModel) -> None:
    for cache, words in refused_caches(unsharded):
        for arguments in ({}, {"max_new_tokens": 2}):
            use = sharded.generate if arguments else sharded
            with pytest.raises((ll.UnsupportedOperationError, ll.ArgumentError), match=words):
                use(IDS, past_key_values=cache, **arguments)
        assert type(cache) is StaticCache


def test_what_layers_record_is_as_long_as_it(place: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_tiny("mixtral", torch.bfloat16, tmp_path)
    recorded = []
    for model in (place(folder, SPANS, attn_implementation="eager"), reference(folder, attn_implementation="eager")):
        past = StaticCache(config=model.config, max_cache_len=20)
        asked = {f"output_{name}": True for name in ("attentions", "hidden_states", "router_logits")}
        with torch.no_grad():
            output = model(IDS, past_key_values=past, labels=IDS, **asked)
            logits, *_, attentions = model(IDS, past_key_values=past, output_attentions=True, return_dict=False)
        recorded.append([output.logits, logits, *output.attentions, *attentions])
        if accelerators.chosen == "cpu":  # a sharded model computes the loss of routers in the caller
            recorded[-1] += [output.loss, output.aux_loss]
        recorded[-1] += [*output.hidden_states, *output.router_logits]
        assert attentions[0].shape == (1, 4, 7, 20)
    assert all(map(torch.equal, *recorded))


class MovingHalfway:
    """A streamer that moves the model while it generates."""

    def __init__(self, model: Any, *spans: list[tuple[str, int, int]]) -> None:
        self.model, self.spans = model, list(spans)

    def put(self, _tokens: torch.Tensor) -> None:
        if self.spans:
            self.model.rebalance(ll.Plan.from_spans(self.spans.pop()))

    def end(self) -> None:
        pass


@pytest.mark.parametrize("arguments", [{}, {**PADDED, "num_beams": 2}], ids=["one row", "beams"])
def test_it_moves_in_the_middle_of_a_text(pair: Pair, arguments: dict[str, Any]) -> None:
    model, unsharded = pair
    streamer = None if arguments else MovingHalfway(model, SPANS, [("c", 0, 4)], [("b", 0, 2), ("a", 2, 4)])
    expected = generate(unsharded, max_cache_len=40, **arguments)
    ours = generate(model, max_cache_len=40, streamer=streamer, **arguments)
    assert_equal(ours, expected)
    past = ours.past_key_values
    fork, fork_of_theirs = copy.deepcopy(past), copy.deepcopy(expected.past_key_values)
    model.rebalance(ll.Plan.from_spans([("d", 0, 2), ("b", 2, 4)]))
    rows = past.batch_size
    for cache, theirs in ((past, expected.past_key_values), (fork, fork_of_theirs)):
        for num_new in (2, 1):
            ids = IDS[:, :num_new].repeat(rows, 1)
            assert torch.equal(step(model, ids, cache), step(unsharded, ids, theirs))
    with pytest.raises(ll.ArgumentError, match="max_cache_len=40"):
        step(model, IDS.repeat(rows, 5), past)


TOKEN_BYTES = 4 * 2 * 2 * 8 * 4  # layers x keys and values x heads x dim x float32


def kv_bytes(model: ll.ShardedModel) -> int:
    return sum(stage.kv_bytes for stage in model.telemetry.stages)


def test_only_tokens_move_and_all_room_is_made(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    past = DynamicCache(config=model.config)
    step(model, IDS, past)
    growing = model.rebalance(ll.Plan.from_spans([("c", 0, 2), ("b", 2, 4)])).migration
    past.end()
    past = StaticCache(config=model.config, max_cache_len=100)
    step(model, IDS, past)
    assert kv_bytes(model) == 100 * TOKEN_BYTES
    migration = model.rebalance(ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])).migration
    assert migration.kv_bytes == growing.kv_bytes
    assert kv_bytes(model) == 100 * TOKEN_BYTES
    del past
    wait_until(lambda: num_sessions(model) == [0, 0])
    assert kv_bytes(model) == 0


def test_the_budget_counts_all_of_its_length_from_the_start(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)], max_kv_tokens=50)
    with pytest.raises(ll.KVCapacityError, match="60 tokens of KV for this session and 0 of others"):
        step(model, IDS.repeat(2, 1), StaticCache(config=model.config, max_cache_len=30))
    past = StaticCache(config=model.config, max_cache_len=40)
    step(model, IDS, past)
    with pytest.raises(ll.KVCapacityError, match="20 tokens of KV for this session and 40 of others"):
        model.generate(IDS, cache_implementation="static", max_new_tokens=14)
    with pytest.raises(ll.KVCapacityError, match="40 tokens of KV for this session and 40 of others"):
        copy.deepcopy(past)
    model.rebalance(ll.Plan.from_spans([("c", 0, 2), ("b", 2, 4)]))
    assert step(model, IDS, past).shape == (1, 7, 128)
    past.end()
    model.generate(IDS, cache_implementation="static", max_new_tokens=44)


def test_blooms_masks_are_as_wide_as_it(place: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_tiny("bloom", torch.float32, tmp_path)
    pair = place(folder, SPANS), reference(folder)
    assert_equal(*(generate(model, **PADDED) for model in pair))
    assert_equal(*(generate(model) for model in pair))
    mask, wide = (torch.tensor([[0, 1, 1, 1, 1, 1, 1] + [0] * zeros]) for zeros in (0, 2))
    for model in pair:
        with pytest.raises((ll.WorkerError, RuntimeError), match="must match the existing size"):
            step(model, IDS, StaticCache(config=model.config, max_cache_len=9), attention_mask=mask)
    pasts = [StaticCache(config=model.config, max_cache_len=9) for model in pair]
    logits = [step(model, IDS, past, attention_mask=wide) for model, past in zip(pair, pasts, strict=True)]
    assert torch.equal(*logits)


def test_windows_alone_go_on_for_ever(place: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_tiny("mistral", torch.float32, tmp_path)
    pair = place(folder, SPANS), reference(folder)
    pasts = [StaticCache(config=model.config, max_cache_len=4) for model in pair]
    for num_new in (7, 1, 2):
        ids = IDS[:, :num_new]
        assert torch.equal(*(step(model, ids, past) for model, past in zip(pair, pasts, strict=True)))
    assert_equal(*(generate(model) for model in pair))
    pasts = [StaticCache(config=model.config, max_cache_len=20) for model in pair]
    for num_new, num_keys in ((3, 6), (4, 7), (2, 7), (1, 6)):  # of a window of 6: not full, filled, and full
        mask = torch.ones(1, 1, num_new, num_keys, dtype=torch.bool).tril(num_keys - num_new)
        ids = IDS[:, :num_new]
        assert torch.equal(
            *(step(model, ids, past, attention_mask=mask) for model, past in zip(pair, pasts, strict=True))
        )
        with pytest.raises(ll.ArgumentError, match="any dimension may be 1"):
            step(pair[0], ids, pasts[0], attention_mask=torch.ones(1, 1, num_new, 20, dtype=torch.bool))

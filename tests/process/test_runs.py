"""Tokens that the last stage chooses are those of the unsharded model, and random numbers go on where it would leave them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import lingualinked as ll
from lingualinked.cluster.messaging.engine import Engine
from process.conftest import load_unsharded

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
BATCH = torch.tensor([[0, 0, 1, 17, 93, 54], [1, 5, 6, 7, 8, 9], [0, 1, 101, 45, 45, 3]])
PADDED = {"input_ids": BATCH, "attention_mask": (BATCH != 0).long()}

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8, "top_k": 0},
    "min-p": {"min_p": 0.05, "top_k": 0},
    "top-h": {"top_h": 0.4, "top_k": 0},
    "typical": {"typical_p": 0.6, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.01, "top_k": 0},
    "eta": {"eta_cutoff": 0.01, "top_k": 0},
    "repetition": {"repetition_penalty": 1.4},
    "repetition of the prompt": {"encoder_repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "lengths": {"min_length": 20, "eos_token_id": [2, 45]},
    "new tokens": {"min_new_tokens": 9, "eos_token_id": [2, 45, 93]},
    "bad words": {"bad_words_ids": [[17], [93, 54], [3, 5, 8]]},
    "biases": {"sequence_bias": [[[17], 3.5], [[93, 54], -9.0]]},
    "forced end": {"forced_eos_token_id": 5},
    "forced beginning": {"forced_bos_token_id": 5},
    "decay": {"exponential_decay_length_penalty": (3, 1.2), "eos_token_id": 93},
    "suppressed": {"suppress_tokens": [17, 54], "begin_suppress_tokens": [93, 8]},
    "more than all": {"top_k": 10**18, "no_repeat_ngram_size": 10**18, "suppress_tokens": [10**9, -5]},
    "invalid values": {"remove_invalid_values": True},
    "all of them": {
        "temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3, "bad_words_ids": [[7]], "renormalize_logits": True,
    },
}  # fmt: skip


class Counted:
    """How many steps the caller has sent, and how many runs it has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = self.num_runs = 0
        send_step = Engine.step

        def step(engine: Engine, devices: Any, step: Any, tensors: Any, timeout_s: float, run: Any = None) -> Any:
            self.num_steps += run is None
            self.num_runs += run is not None
            return send_step(engine, devices, step, tensors, timeout_s, run)

        monkeypatch.setattr(Engine, "step", step)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def assert_alike(sharded: Any, unsharded: PreTrainedModel, num_microbatches: int | None = 1, **arguments: Any) -> Any:
    """Generate with both from the same seed; tokens and torch's generator afterwards are equal."""
    arguments = {"max_new_tokens": 16, "eos_token_id": None, **arguments}
    torch.manual_seed(7)
    expected = unsharded.generate(**arguments)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    ours = sharded.generate(**arguments, num_microbatches=num_microbatches)
    assert torch.equal(getattr(ours, "sequences", ours), getattr(expected, "sequences", expected))
    assert torch.equal(torch.get_rng_state(), state)
    return ours


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(sharded: Any, unsharded: PreTrainedModel, counted: Counted, name: str, do_sample: bool) -> None:
    prompt = PADDED if do_sample else {"input_ids": IDS}
    assert_alike(sharded, unsharded, **prompt, do_sample=do_sample, **SETTINGS[name])
    assert (counted.num_steps, counted.num_runs) == (0, 1)


def test_rows_that_meet_the_end_of_text_are_padded(sharded: Any, unsharded: PreTrainedModel, counted: Counted) -> None:
    found = unsharded.generate(**PADDED, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 6:]
    for eos in ([int(found[0, 3])], [int(row[2 + 3 * index]) for index, row in enumerate(found)]):
        assert_alike(sharded, unsharded, **PADDED, eos_token_id=eos, pad_token_id=0, max_new_tokens=100)
    assert counted.num_steps == 0


def test_many_tokens_are_several_runs(sharded: Any, unsharded: PreTrainedModel, counted: Counted) -> None:
    assert_alike(sharded, unsharded, input_ids=IDS, max_new_tokens=150, do_sample=True)
    assert (counted.num_steps, counted.num_runs) == (0, 3)


@pytest.mark.parametrize("pad", [-3, 10**17])
def test_tokens_that_are_none_are_chosen_here(
    sharded: Any, unsharded: PreTrainedModel, counted: Counted, pad: int
) -> None:
    """A row that has ended is padded with what transformers is told to, though no step could take it."""
    found = unsharded.generate(**PADDED, max_new_tokens=2, do_sample=False, eos_token_id=None)[:, 6:]
    ids = assert_alike(
        sharded, unsharded, **PADDED, do_sample=False, eos_token_id=int(found[0, 0]), pad_token_id=pad, max_new_tokens=2
    )
    assert ids[0, -1] == pad
    assert counted.num_runs == 0


def test_numbers_that_no_message_can_hold_are_used_here(
    sharded: Any, unsharded: PreTrainedModel, counted: Counted
) -> None:
    assert_alike(sharded, unsharded, input_ids=IDS, do_sample=True, top_k=10**30, no_repeat_ngram_size=10**25)
    assert counted.num_runs == 0


class Heard(BaseStreamer):
    """What a streamer was given."""

    def __init__(self, on_put: Callable[[int], None] = lambda _: None) -> None:
        self.given: list[list[int]] = []
        self._on_put = on_put

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.tolist())
        self._on_put(len(self.given) - 1)  # tokens chosen so far

    def end(self) -> None:
        self.given.append([])


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_criteria_of_the_users_end_a_run(
    sharded: Any, unsharded: PreTrainedModel, counted: Counted, do_sample: bool
) -> None:
    def stop(ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.tensor([bool(row[-1] % 7 == 3) or len(row) > 30 + index for index, row in enumerate(ids)])

    heard = [Heard(), Heard()]
    for model, streamer in zip((sharded, unsharded), heard, strict=True):
        torch.manual_seed(7)
        ours = model.generate(
            **PADDED,
            do_sample=do_sample,
            max_new_tokens=60,
            eos_token_id=[3, 9],
            pad_token_id=0,
            stopping_criteria=[stop],
            streamer=streamer if do_sample is None else None,
            **({"num_microbatches": 1} if model is sharded else {}),
        )
        heard[model is unsharded].given.append(ours.tolist())
    assert heard[0].given == heard[1].given
    assert counted.num_steps == 0


def test_a_streamer_hears_the_same(sharded: Any, unsharded: PreTrainedModel, counted: Counted) -> None:
    ours, theirs = Heard(), Heard()
    for model, streamer in ((sharded, ours), (unsharded, theirs)):
        model.generate(IDS, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert ours.given == theirs.given
    assert counted.num_steps == 0


def test_a_streamer_that_draws_random_numbers(sharded: Any, unsharded: PreTrainedModel) -> None:
    def draw(index: int) -> None:
        if index == 3:
            torch.rand(1)

    results = []
    for model in (sharded, unsharded):
        torch.manual_seed(7)
        results.append((model.generate(IDS, max_new_tokens=20, do_sample=True, streamer=Heard(draw)), torch.rand(1)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_streamer_that_raises_leaves_the_kv_that_counts(sharded: Any, unsharded: PreTrainedModel) -> None:
    def fail(index: int) -> None:
        if index == 4:
            raise RuntimeError("the pipe is closed")

    results = []
    for model in (sharded, unsharded):
        past = DynamicCache(config=model.config)
        with pytest.raises(RuntimeError, match="the pipe is closed"):
            model.generate(IDS, max_new_tokens=20, do_sample=False, streamer=Heard(fail), past_key_values=past)
        assert past.get_seq_length() == IDS.shape[1] + 3
        results.append(model(IDS[:, :2], past_key_values=past).logits)
    assert torch.equal(*results)


def test_a_returned_kv_cache_goes_on(sharded: Any, unsharded: PreTrainedModel) -> None:
    def stop(ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 12)

    results = []
    for model in (sharded, unsharded):
        options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None, "max_new_tokens": 40}
        first = model.generate(IDS, stopping_criteria=[stop], **options)
        longer = torch.cat([first.sequences, IDS[:, :3]], dim=-1)
        again = model.generate(longer, past_key_values=first.past_key_values, **options)
        results.append((again.sequences, torch.tensor(first.past_key_values.get_seq_length())))
        if model is sharded:
            again.past_key_values.end()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_static_kv_cache(sharded: Any, unsharded: PreTrainedModel, counted: Counted) -> None:
    assert_alike(sharded, unsharded, input_ids=IDS, cache_implementation="static", do_sample=False)
    assert (counted.num_steps, counted.num_runs) == (0, 1)


def test_what_can_not_be_chosen_raises_as_transformers_does(sharded: Any, unsharded: PreTrainedModel) -> None:
    for model in (unsharded, sharded):
        with pytest.raises(RuntimeError, match="probability tensor contains"):
            model.generate(
                IDS, max_new_tokens=5, do_sample=True, sequence_bias=[[[token], float("-inf")] for token in range(128)]
            )


def test_layers_move_in_the_middle_of_a_run(place: Any, tiny_llama: str, unsharded: PreTrainedModel) -> None:
    """The streamer asks for it, whose own run has to end first."""
    with place(tiny_llama, [("a", 0, 2), ("b", 2, 4)]) as model:

        def move(index: int) -> None:
            if index in (5, 11):
                spans = [("a", 0, 1), ("b", 1, 4)] if index == 5 else [("c", 0, 3), ("b", 3, 4)]
                model.rebalance(ll.Plan.from_spans(spans))

        streamer = Heard(move)
        ours = model.generate(IDS, max_new_tokens=90, do_sample=False, eos_token_id=None, streamer=streamer)
        assert torch.equal(ours, unsharded.generate(IDS, max_new_tokens=90, do_sample=False, eos_token_id=None))
        assert [stage.device for stage in model.plan.stages] == ["c", "b"]


def test_weights_change_in_the_middle_of_a_run(place: Any, tiny_llama: str) -> None:
    results = []
    for model in (place(tiny_llama, [("a", 0, 2), ("b", 2, 4)]), load_unsharded(tiny_llama)):

        def halve(index: int, model: Any = model) -> None:
            if index == 5:
                with torch.no_grad():
                    model.model.layers[1].mlp.down_proj.weight.mul_(0.5)

        with contextlib.nullcontext() if results else pytest.warns(ll.StaleKVWarning):
            options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
            results.append(model.generate(IDS, streamer=Heard(halve), **options))
    assert torch.equal(*results)


def test_room_for_kv_is_what_steps_need(place: Any, tiny_llama: str, unsharded: PreTrainedModel) -> None:
    with place(tiny_llama, [("a", 0, 2), ("b", 2, 4)], max_kv_tokens=26) as model:
        ours = model.generate(IDS, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert torch.equal(ours, unsharded.generate(IDS, max_new_tokens=20, do_sample=False, eos_token_id=None))
        with pytest.raises(ll.KVCapacityError):
            model.generate(IDS, max_new_tokens=22, do_sample=False, eos_token_id=None)


def test_threads_that_sample_draw_other_numbers(sharded: Any) -> None:
    def sample(_: int) -> tuple[int, ...]:
        return tuple(sharded.generate(IDS, max_new_tokens=30, do_sample=True, top_k=0, eos_token_id=None)[0].tolist())

    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(sample, range(6)))
    assert len(set(texts)) == len(texts)


def test_steps_are_reported_one_by_one(place: Any, tiny_llama: str) -> None:
    with place(tiny_llama, [("a", 0, 2), ("b", 2, 4)]) as model:
        model.generate(IDS, max_new_tokens=10, do_sample=False, eos_token_id=None)
        steps = model.telemetry.steps
        assert [(each.number, each.tokens, each.context) for each in steps] == [
            (0, 7, 0),
            *((number, 1, 6 + number) for number in range(1, 10)),
        ]
        assert all(each.sent_bytes > 0 for step in steps for each in step.stages)


def test_few_bytes_come_back(place: Any, tiny_llama: str) -> None:
    with place(tiny_llama, [("a", 0, 2), ("b", 2, 3), ("c", 3, 4)]) as model:
        model.generate(IDS, max_new_tokens=40, do_sample=True, eos_token_id=None)
        hidden = model.config.hidden_size * 4
        for step in model.telemetry.steps:
            *hops, back = step.stages
            assert back.sent_bytes <= 256
            assert step.number == 0 or all(hop.sent_bytes - hidden <= 256 + 32 * 3 for hop in hops)

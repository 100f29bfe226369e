"""New tokens of several sessions in one pass: each text's logits are those of the text alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.cluster.packed.packed_flight import PackedPart, PartReply
from lingualinked.model.adapters.adapter_data import AdapterUse
from lingualinked.model.packed.choosing import describe_choice
from lingualinked.model.packed.token_choice import TokenChoice

pytestmark = pytest.mark.process

PROMPTS = ([1, 17, 93], [5, 8, 33, 2, 71, 14, 60, 9], [44])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny("llama", torch.bfloat16, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def uncut(folder: Any) -> Any:
    return reference(folder)


@pytest.fixture(scope="module")
def model(shared_fork_server: None, folder: Any) -> Iterator[Any]:
    devices = [ll.Device(name=name, threads=1) for name in ("a", "b")]
    with ll.ShardedModel.from_pretrained(
        folder, devices=devices, plan="even", progress=False, max_kv_tokens=200
    ) as model:
        yield model


def alone(uncut: Any, prompt: list[int], num_new: int) -> list[Tensor]:
    """The last logits of a prompt and of greedy tokens after it, each step run as two equal rows: one has other bits."""
    torch.set_num_threads(1)
    rows, past, logits = torch.tensor([prompt, prompt]), None, []
    with torch.inference_mode():
        for _ in range(num_new):
            output = uncut(rows, past_key_values=past, use_cache=True)
            past, rows = output.past_key_values, output.logits[:, -1:].argmax(-1)
            logits.append(output.logits[0, -1])
    return logits


def run(model: Any, *parts: PackedPart) -> tuple[PartReply, ...]:
    return model._pipeline.packed_steps.start(parts).result()  # type: ignore[no-any-return]


def test_prompts_and_tokens_of_several_texts_run_together(model: Any, uncut: Any) -> None:
    expected = [alone(uncut, prompt, 4) for prompt in PROMPTS]
    sessions = [model._pipeline.open_session() for _ in PROMPTS]
    said: list[list[Tensor]] = [[] for _ in PROMPTS]
    for step in range(6):  # text n begins at step n
        parts, places = [], []
        for place, (session, prompt) in enumerate(zip(sessions, PROMPTS, strict=True)):
            if place <= step < place + 4:
                ids = prompt if place == step else [int(said[place][-1].argmax())]
                parts.append(PackedPart(session, ids))
                places.append(place)
        for place, reply in zip(places, run(model, *parts), strict=True):
            assert reply.error is None
            said[place].append(reply.logits[0])
    for ours, theirs in zip(said, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_the_last_stage_chooses_tokens(model: Any, uncut: Any) -> None:
    sessions = [model._pipeline.open_session() for _ in PROMPTS]
    parts = [
        PackedPart(sessions[0], PROMPTS[0], choice=TokenChoice()),
        PackedPart(sessions[1], PROMPTS[1], num_logits=2),
        PackedPart(sessions[2], PROMPTS[2], choice=TokenChoice(returns_logits=True, returns_logprob=True)),
    ]
    first, second, third = run(model, *parts)
    expected = [alone(uncut, prompt, 1)[0] for prompt in PROMPTS]
    assert first.token == int(expected[0].argmax())
    assert first.logits is None is first.logprob
    assert second.token is None
    assert second.logits.shape == (2, uncut.config.vocab_size)
    assert torch.equal(second.logits[1], expected[1])
    assert torch.equal(third.logits[0], expected[2])
    assert third.logprob == float(expected[2].float().softmax(-1).max().log())


def test_a_token_is_drawn_by_its_own_seed_and_processors(model: Any, uncut: Any) -> None:
    specs = describe_choice([TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)])
    assert specs is not None
    sessions = [model._pipeline.open_session() for _ in PROMPTS]
    choices = [TokenChoice(processors=specs, seed=seed) for seed in (1, 2, 2**62)]
    replies = run(model, *map(PackedPart, sessions, PROMPTS, [1] * 3, choices))
    for reply, prompt, choice in zip(replies, PROMPTS, choices, strict=True):
        scores = TopKLogitsWarper(5)(None, alone(uncut, prompt, 1)[0][None].float() / 0.7)
        generator = torch.Generator().manual_seed(choice.seed)
        assert reply.token == int(torch.multinomial(scores[0].softmax(-1), 1, generator=generator))
    assert describe_choice([RepetitionPenaltyLogitsProcessor(1.2)]) is None


def test_parts_of_a_prompt_follow_each_other_through_the_stages(model: Any, uncut: Any) -> None:
    prompt = PROMPTS[1]
    past = model._pipeline.open_session()
    steps = model._pipeline.packed_steps
    flights = [steps.start([PackedPart(past, prompt[at : at + 3], int(at == 6))]) for at in (0, 3, 6)]
    *before, last = [flight.result()[0] for flight in flights]
    assert all(reply.logits is None is reply.error for reply in before)
    whole = model._pipeline.open_session()
    expected = run(model, PackedPart(whole, prompt))[0]
    assert torch.equal(last.logits, expected.logits)


def test_a_session_takes_part_in_other_steps_too(model: Any) -> None:
    past, whole = model._pipeline.open_session(), model._pipeline.open_session()
    ids = torch.tensor([PROMPTS[1]])
    past.step(ids[:, :4], None, None, 1)
    packed = run(model, PackedPart(past, PROMPTS[1][4:6]))[0]
    after, _ = past.step(ids[:, 6:], None, None, 1)
    every, _ = whole.step(ids, None, None, 0)
    for ours, place in ((packed.logits[0], 5), (after[0, 0], 7)):
        torch.testing.assert_close(ours, every[0, place], rtol=0, atol=0.05)
    assert past.num_tokens == 8


def test_texts_with_a_common_beginning_share_it(model: Any) -> None:
    first, second, whole = (model._pipeline.open_session() for _ in range(3))
    run(model, PackedPart(first, PROMPTS[1]))
    first.copy_to(second, num_tokens=5)
    assert second.num_tokens == 5
    ours = run(model, PackedPart(second, [11, 12]), PackedPart(first, [13]))
    run(model, PackedPart(whole, PROMPTS[1][:5]))
    theirs = run(model, PackedPart(whole, [11, 12]))
    assert torch.equal(ours[0].logits, theirs[0].logits)
    with pytest.raises(ll.ArgumentError, match="can't copy 10 of 9 tokens"):
        first.copy_to(model._pipeline.open_session(), num_tokens=10)


def test_what_fails_for_one_text_fails_for_it_alone(model: Any) -> None:
    good, small, big, wrong = (model._pipeline.open_session(size) for size in (0, 4, 0, 0))
    expected = run(model, PackedPart(model._pipeline.open_session(), PROMPTS[0]))[0].logits
    big_ids = [7] * 250
    wrong._next_step = 3
    replies = run(
        model,
        PackedPart(small, [1] * 5),
        PackedPart(good, PROMPTS[0]),
        PackedPart(big, big_ids),
        PackedPart(wrong, [5]),
    )
    assert isinstance(replies[0].error, ll.ArgumentError)
    assert "max_cache_len" in str(replies[0].error)
    assert torch.equal(replies[1].logits, expected)
    assert isinstance(replies[2].error, ll.KVCapacityError)
    assert isinstance(replies[3].error, ll.WorkerError)
    assert "has no state here" in str(replies[3].error)
    assert [session.ended for session in (small, good, big, wrong)] == [True, False, False, True]
    assert run(model, PackedPart(good, [4]), PackedPart(big, [5]))[1].error is None  # the session is as it was
    with pytest.raises(ll.ClosedError, match="ended with ArgumentError"):
        raise run(model, PackedPart(small, [1]))[0].error


def test_sessions_move_between_packed_steps(model: Any, uncut: Any) -> None:
    expected = [alone(uncut, prompt, 6) for prompt in PROMPTS]
    sessions = [model._pipeline.open_session() for _ in PROMPTS]
    said: list[list[Tensor]] = [[] for _ in PROMPTS]
    before = model.plan
    for step in range(6):
        if step in (2, 4):
            model.rebalance(ll.Plan.from_spans([("a", 0, 1), ("b", 1, 4)]) if step == 2 else before)
        ids = PROMPTS if step == 0 else [[int(logits[-1].argmax())] for logits in said]
        for logits, reply in zip(said, run(model, *map(PackedPart, sessions, ids)), strict=True):
            logits.append(reply.logits[0])
    for ours, theirs in zip(said, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_layers_move_while_packed_steps_go_on(model: Any, uncut: Any) -> None:
    """Two groups of sessions take turns, so that some are always in flight."""
    groups = [[model._pipeline.open_session() for _ in range(2)] for _ in range(2)]
    steps, choice, before = model._pipeline.packed_steps, TokenChoice(), model.plan
    tokens: list[list[int]] = [[], []]
    with ThreadPoolExecutor(1) as pool:
        moved = pool.submit(model.rebalance, ll.Plan.from_spans([("a", 0, 3), ("b", 3, 4)]))
        flights = [steps.start([PackedPart(each, PROMPTS[0], 1, choice) for each in group]) for group in groups]
        while not moved.done() or len(tokens[0]) < 4:
            for group, flight in enumerate(flights):
                first, second = flight.result()
                assert first.token == second.token
                assert first.token is not None
                tokens[group].append(first.token)
                flights[group] = steps.start([PackedPart(each, [first.token], 1, choice) for each in groups[group]])
                if len(tokens[0]) > 40:
                    groups[group] = [model._pipeline.open_session() for _ in range(2)]  # the budget is small
        for flight in flights:
            flight.result()
    moved.result()
    assert tokens[0][:4] == tokens[1][:4] == [int(logits.argmax()) for logits in alone(uncut, PROMPTS[0], 4)]
    model.rebalance(before)


def test_they_are_in_the_telemetry(model: Any) -> None:
    sessions = [model._pipeline.open_session() for _ in PROMPTS]
    run(model, *map(PackedPart, sessions, PROMPTS))
    run(model, *[PackedPart(session, [3]) for session in sessions])
    *_, prompts, tokens = model.telemetry.steps
    assert (prompts.rows, prompts.tokens, prompts.context) == (1, 12, 0)
    assert (tokens.rows, tokens.tokens, tokens.context) == (3, 1, 4)
    assert [stage.device for stage in tokens.stages] == ["a", "b"]
    assert all(stage.compute_s > 0 for stage in tokens.stages)


def test_parts_that_can_not_be_are_refused(model: Any) -> None:
    pipeline = model._pipeline
    steps, session = pipeline.packed_steps, pipeline.open_session()
    padded, rows = pipeline.open_session(), pipeline.open_session()
    padded.step(torch.tensor([[0, 5]]), torch.tensor([[0, 1]]), None, 1)
    rows.step(torch.tensor([[5], [6]]), None, None, 1)
    for parts, because in (
        ([], "a packed step of 0 parts"),
        ([PackedPart(session, [1])] * 2, "one part for each of its sessions"),
        ([PackedPart(session, [])], "num_logits=1 of 0 tokens"),
        ([PackedPart(session, [1], 2)], "num_logits=2 of 1 token"),
        ([PackedPart(session, [1], 0, TokenChoice())], "num_logits=0"),
        ([PackedPart(padded, [1])], "has padding"),
        ([PackedPart(rows, [1])], "2 rows"),
    ):
        with pytest.raises(ll.ArgumentError, match=because):
            steps.start(parts)
    with pytest.raises(ll.ArgumentError, match="adapters by row"):
        steps.start([PackedPart(session, [1])], AdapterUse(("x",), ("x",)))
    flight = steps.start([PackedPart(session, [1])])
    with pytest.raises(ll.ArgumentError, match="in use"):
        session.copy_to(pipeline.open_session())
    flight.result()


def test_a_class_whose_attention_is_its_own_is_refused(shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("bloom", torch.float32, tmp_path)
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan="even", progress=False) as model:
        session = model._pipeline.open_session()
        with pytest.raises(ll.UnsupportedOperationError, match="BloomForCausalLM does not go through"):
            model._pipeline.packed_steps.start([PackedPart(session, [1])])

"""A prompt in chunks gives what the unsharded model gives with the same chunks, while all of them are on their way at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.cluster.sessions.session import Session
from lingualinked.telemetry.perfetto import trace_of
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.arange(3, 26)[None] * 7 % 90 + 3
BATCH = torch.cat([IDS, IDS.flip(1), IDS.roll(5)])
PADDED = {"inputs": BATCH, "attention_mask": torch.ones_like(BATCH).index_fill(1, torch.arange(3), 0)}
PADDED["attention_mask"][1] = 1
PADDED["attention_mask"][2, :9] = 0  # more than a chunk

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "token by token": {"prefill_chunk_size": 1},
    "in one": {"prefill_chunk_size": 40},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling of a padded batch": {**PADDED, "num_beams": 2, "do_sample": True},
    "a padded batch": PADDED,
    "positions": {"position_ids": torch.arange(2, 25)[None]},
    "a static KV cache": {"cache_implementation": "static"},
    "a static KV cache of a padded batch": {**PADDED, "cache_implementation": "static"},
}

Pair = tuple[Any, PreTrainedModel]


@pytest.fixture(scope="module", params=["llama", "gemma2", "bloom"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Rotary positions, sliding windows, and a bias by distance."""
    folder = save_tiny(request.param, torch.bfloat16, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("a", 3, 4)])
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model, reference(folder)


def generate(model: Any, **arguments: Any) -> Any:
    torch.manual_seed(7)
    call = {"inputs": IDS, "max_new_tokens": 5, "eos_token_id": None, "do_sample": False, "prefill_chunk_size": 5}
    return model.generate(**call | arguments, return_dict_in_generate=True, output_logits=True)


def assert_equal(ours: Any, theirs: Any, what: str = "") -> None:
    assert torch.equal(ours.sequences, theirs.sequences), what
    assert all(map(torch.equal, ours.logits, theirs.logits)), what


def prompt_steps(model: Any) -> list[ll.StepSample]:
    """The steps of the session that ran last, before its first token."""
    steps = model.telemetry.history.steps
    return [step for step in steps if step.session == steps[-1].session and step.context < IDS.shape[1]]


def test_each_way_to_generate(pair: Pair) -> None:
    for mode, arguments in MODES.items():
        if "position_ids" in arguments and pair[1].config.model_type == "bloom":
            continue
        assert_equal(*(generate(model, **arguments) for model in pair), mode)


def test_a_text_goes_on_in_chunks(pair: Pair) -> None:
    longer = torch.cat([IDS, IDS.flip(1)], dim=1)[:, :40]
    results = []
    for model in pair:
        past = generate(model, max_new_tokens=1).past_key_values
        results.append(generate(model, inputs=longer, past_key_values=past, prefill_chunk_size=4))
        assert results[-1].past_key_values.get_seq_length() == 44
    assert_equal(*results)


@pytest.mark.parametrize(
    "arguments", [{}, {"do_sample": True, "top_k": 20}, {"inputs": BATCH, "do_sample": True}], ids=str
)
def test_tokens_that_the_last_stage_chooses_follow_the_chunks(
    sharded: Any, unsharded: PreTrainedModel, arguments: dict[str, Any]
) -> None:
    call = {"inputs": IDS, "max_new_tokens": 8, "eos_token_id": None, "do_sample": False, "prefill_chunk_size": 5}
    tokens = []
    for model in (sharded, unsharded):
        torch.manual_seed(3)
        tokens.append(model.generate(**call | arguments))
    assert torch.equal(*tokens)
    assert [step.tokens for step in prompt_steps(sharded)] == [5, 5, 5, 5, 3]


def test_microbatches_have_chunks_of_their_own(sharded: Any) -> None:
    ids = torch.cat([BATCH, IDS.roll(9)])
    whole = generate(sharded, inputs=ids, num_microbatches=2)
    chunks = [step for step in sharded.telemetry.history.steps[-18:] if step.context < IDS.shape[1]]
    assert [step.rows for step in chunks] == [2] * 10
    parts = [generate(sharded, inputs=part) for part in ids.split(2)]
    assert torch.equal(whole.sequences, torch.cat([part.sequences for part in parts]))
    assert all(map(torch.equal, whole.logits, map(torch.cat, zip(*(part.logits for part in parts), strict=True))))


def test_chunks_are_chosen_and_stay_as_they_are(sharded: Any, unsharded: PreTrainedModel) -> None:
    ids = IDS.repeat(1, 12)
    first, second = (generate(sharded, inputs=ids, prefill_chunk_size="auto") for _ in range(2))
    steps = [step for step in sharded.telemetry.history.steps[-40:] if step.tokens > 1]
    sizes = [step.tokens for step in steps if step.session == steps[-1].session]
    assert sum(sizes) == ids.shape[1]
    assert_equal(first, second)
    assert_equal(first, generate(unsharded, inputs=ids, prefill_chunk_size=sizes[0]))


def test_without_a_kv_cache_auto_leaves_a_prompt_whole(sharded: Any, unsharded: PreTrainedModel) -> None:
    whole = generate(unsharded, prefill_chunk_size=None)
    assert torch.equal(generate(sharded, prefill_chunk_size="auto", use_cache=False).sequences, whole.sequences)
    with pytest.raises(ValueError, match="without a cache"):
        generate(sharded, use_cache=False)


@pytest.mark.parametrize("size", [0, -3, True, 2.5, "fast"])
def test_what_is_no_size_is_refused(sharded: Any, size: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=f"prefill_chunk_size={size!r} must be a positive number of tokens"):
        generate(sharded, prefill_chunk_size=size)


def test_embeddings_are_not_cut(sharded: Any, unsharded: PreTrainedModel) -> None:
    embeddings = unsharded.get_input_embeddings()(IDS).detach()
    arguments = {"inputs": None, "inputs_embeds": embeddings}
    with pytest.raises(ll.ArgumentError, match="prefill_chunk_size=5 of inputs_embeds"):
        generate(sharded, **arguments)
    ours = generate(sharded, **arguments, prefill_chunk_size="auto")
    assert_equal(ours, generate(unsharded, **arguments, prefill_chunk_size=None))


def test_only_the_last_chunk_gives_logits(sharded: Any) -> None:
    generate(sharded)
    sizes = [step.stages[-1].sent_bytes for step in prompt_steps(sharded)]
    assert max(sizes[:-1]) + 4 * 128 <= sizes[-1] <= max(sizes[:-1]) + 4 * 128 + 100


def test_whoever_looks_at_a_chunk_sees_what_it_gives(sharded: Any, unsharded: PreTrainedModel) -> None:
    seen: list[list[torch.Tensor]] = []
    for model in (sharded, unsharded):
        seen.append([])
        outer = model.register_forward_hook(lambda _, __, output: seen[-1].append(output.logits))
        inner = model.model.layers[2].register_forward_hook(lambda _, __, output: seen[-1].append(output))
        generate(model)
        inner.remove()
        generate(model)
        outer.remove()
    assert len(seen[0]) == 3 * (5 + 4)
    assert all(map(torch.equal, *seen))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"inputs": IDS.repeat(1, 5)}, ll.KVCapacityError),
        ({"inputs": torch.cat([IDS, torch.tensor([[128]])], dim=1)}, ll.ArgumentError),
    ],
    ids=["no room for the last chunk", "no such token in the last chunk"],
)
def test_what_is_refused_leaves_a_text_as_it_was(
    place: Callable[..., Any], tiny_llama: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)], max_kv_tokens=80)
    first = generate(model, max_new_tokens=1)
    whole = generate(model, inputs=torch.cat([first.sequences, IDS], dim=1)).sequences
    past, number = first.past_key_values, len(model.telemetry.history.steps)
    with pytest.raises(error):
        generate(
            model,
            **arguments | {"inputs": torch.cat([first.sequences, arguments["inputs"]], dim=1)},
            past_key_values=past,
        )
    assert (past.get_seq_length(), len(model.telemetry.history.steps)) == (IDS.shape[1], number)
    assert torch.equal(
        generate(model, inputs=torch.cat([first.sequences, IDS], dim=1), past_key_values=past).sequences, whole
    )


def at_chunk(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Session], None]) -> None:
    """Act when a chunk of the prompt is about to be sent."""
    start = Session.start_step
    left = [number]

    def start_step(session: Session, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act(session)
        return start(session, *arguments)

    monkeypatch.setattr(Session, "start_step", start_step)


def test_layers_move_between_two_chunks(
    monkeypatch: pytest.MonkeyPatch, place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    moves: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as pool:

        def move(session: Session) -> None:
            plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
            moves.append(pool.submit(model.rebalance, plan))
            wait_until(lambda: not session.runs_on(model._pipeline._routes.target))

        at_chunk(monkeypatch, 3, move)
        ours = generate(model)
        moves[0].result()
    assert_equal(ours, generate(unsharded))
    assert [step.plan_version for step in prompt_steps(model)] == [1, 1, 2, 2, 2]


def test_an_interrupt_ends_the_session(monkeypatch: pytest.MonkeyPatch, sharded: Any) -> None:
    def interrupt(_: Session) -> None:
        raise KeyboardInterrupt

    past = generate(sharded, max_new_tokens=1).past_key_values
    at_chunk(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(sharded, past_key_values=past, inputs=IDS.repeat(1, 2))
    with pytest.raises(ll.ClosedError):
        generate(sharded, past_key_values=past, inputs=IDS.repeat(1, 3))
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])
    generate(sharded)


@pytest.fixture(scope="module")
def far(shared_fork_server: None, tiny_llama: str) -> Iterator[Any]:
    """Two stages between which messages travel for longer than chunks take."""
    devices = [ll.Device(name="near", threads=1), ll.Device(name="far", threads=1, latency="100ms")]
    plan = ll.Plan.from_spans([("near", 0, 2), ("far", 2, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, devices=devices, plan=plan, progress=False) as model:
        yield model


def test_a_trace_shows_chunks_in_all_stages_at_once(far: Any) -> None:
    generate(far, max_new_tokens=1)
    generate(far, max_new_tokens=1)
    chunks = prompt_steps(far)
    assert len(chunks) == 5
    events = trace_of(far.telemetry.history)["traceEvents"]
    tracks = {each["tid"]: each["args"]["name"] for each in events if each["name"] == "thread_name"}
    slices: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["name"] == "prefill" and event["args"]["session"] == chunks[0].session:
            slices.setdefault(tracks[event["tid"]].rstrip(" 12345"), []).append(event)
    near, far_away, caller = slices["near [0, 2)"], slices["far [2, 4)"], slices["caller"]
    for stage in (near, far_away, caller):
        assert len(stage) == 5
    # All are sent before the first one is back, and the first stage has begun the last before the next stage begins.
    assert max(each["ts"] for each in caller) < min(each["ts"] + each["dur"] for each in caller)
    assert near[-1]["ts"] < far_away[0]["ts"]
    for stage in (near, far_away):
        numbers = [each["args"]["step"] for each in sorted(stage, key=lambda each: each["ts"])]
        assert numbers == sorted(numbers)


def test_a_death_ends_all_chunks(monkeypatch: pytest.MonkeyPatch, far: Any) -> None:
    at_chunk(monkeypatch, 3, lambda _: os.kill(far.cluster.pids["far"], signal.SIGKILL))
    with pytest.raises(ll.WorkerDiedError, match="'far'"):
        generate(far)
    assert not far._pipeline._engine._exchange._pending._pending

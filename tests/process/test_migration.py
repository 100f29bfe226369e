"""Layers move between workers while sessions go on: no token changes, nothing is lost, and what fails leads back."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import PreTrainedModel

import lingualinked as ll
from accelerators import device
from families import reference, save_tiny
from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.workers.inspection import inspect_workers
from processes import stopped
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality, pytest.mark.slow]

NUM_LAYERS = 4
IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
PADDED = torch.tensor([[0, 0, 1, 17, 93, 54], [1, 5, 6, 7, 8, 9], [0, 1, 11, 45, 45, 3]])
CALLS: dict[str, dict[str, Any]] = {
    "one row": {"input_ids": IDS},
    "a padded batch": {"input_ids": PADDED, "attention_mask": (PADDED != 0).long()},
    "beams": {"input_ids": IDS, "num_beams": 3},
    "prompt lookup": {"input_ids": IDS, "prompt_lookup_num_tokens": 3},
    "static KV": {"input_ids": IDS, "num_beams": 2, "cache_implementation": "static"},
}
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral")  # full attention, sliding windows, tied ends, experts


@st.composite
def plans(draw: st.DrawFn) -> ll.Plan:
    """Place the layers on one to four devices in any order; a device may hold both ends."""
    devices = draw(st.permutations("abcd"))
    inner = draw(st.sets(st.integers(1, NUM_LAYERS - 1)))
    ends = [0, *sorted(inner), NUM_LAYERS]
    if len(inner) > 1 and draw(st.booleans()):
        devices[len(inner)] = devices[0]
    return ll.Plan.from_spans((devices[i], start, end) for i, (start, end) in enumerate(itertools.pairwise(ends)))


def generate(model: Any, call: str, num_new: int) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        **CALLS[call], max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
    )
    return tokens


@pytest.fixture
def moving(shared_cluster: ll.Cluster, tiny_llama: str) -> Iterator[Any]:
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model


@pytest.mark.parametrize("family", FAMILIES)
def test_random_moves_under_load_change_no_token(family: str, shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny(family, torch.float32, tmp_path)
    whole = reference(folder)
    expected = {call: generate(whole, call, 40) for call in CALLS}
    enough = threading.Event()
    wrong: list[str] = []

    def keep_generating(call: str) -> None:
        while not wrong:
            try:
                if not torch.equal(generate(model, call, 40), expected[call]):
                    wrong.append(call)
            except Exception as error:  # noqa: BLE001 - the test says which
                wrong.append(f"{call}: {error!r}")
            if enough.is_set():
                return

    @settings(max_examples=4)
    @given(schedule=st.lists(plans(), min_size=3, max_size=6))
    def move(schedule: list[ll.Plan]) -> None:
        for plan in schedule:
            model.rebalance(plan)
            assert [(each.device, each.start, each.end) for each in model.plan.stages] == [
                (each.device, each.start, each.end) for each in plan.stages
            ]
        assert wrong == []

    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as model:
        threads = [threading.Thread(target=keep_generating, args=(call,)) for call in CALLS]
        for thread in threads:
            thread.start()
        try:
            move()
        finally:
            enough.set()
            for thread in threads:
                thread.join()
        assert wrong == []
        wait_until(lambda: sum(num_sessions(model)) == 0)
        assert all(stage.kv_bytes == 0 for stage in model.telemetry.stages)


def test_a_session_that_rests_is_moved_along(moving: Any, unsharded: PreTrainedModel) -> None:
    past, expected = moving(IDS).past_key_values, unsharded(IDS).past_key_values
    for spans in ([("c", 0, 4)], [("d", 0, 1), ("c", 1, 4)], [("a", 0, 2), ("b", 2, 4)]):
        migration = moving.rebalance(ll.Plan.from_spans(spans)).migration
        assert migration.succeeded
        assert migration.num_sessions == 1
        assert migration.kv_bytes > 0
        logits = moving(IDS[:, :2], past_key_values=past).logits
        assert torch.equal(logits, unsharded(IDS[:, :2], past_key_values=expected).logits)
    assert len(moving.telemetry.migrations) == 3


def test_layers_that_stay_are_not_read_again(moving: Any) -> None:
    migration = moving.rebalance(ll.Plan.from_spans([("a", 0, 1), ("b", 1, 4)])).migration
    (move,) = migration.moves
    assert (move.start, move.end, move.source, move.target) == (1, 2, "a", "b")
    assert 0 < migration.weight_bytes < moving.plan.stages[1].weight_bytes / 2


def test_telemetry_tells_where_each_step_spent_its_time(moving: Any) -> None:
    moving.generate(IDS, max_new_tokens=4, min_new_tokens=4)
    moving.rebalance(ll.Plan.from_spans([("c", 0, 4)]))
    moving.generate(IDS, max_new_tokens=3, min_new_tokens=3)
    steps = moving.telemetry.steps
    assert [step.plan_version for step in steps] == [1] * 4 + [2] * 3
    assert [(step.tokens, step.context) for step in steps[:3]] == [(7, 0), (1, 7), (1, 8)]
    for step in steps:
        assert [stage.device for stage in step.stages] == (["a", "b"] if step.plan_version == 1 else ["c"])
        assert all(stage.compute_s > 0 and stage.sent_bytes > 0 for stage in step.stages)
        assert sum(stage.compute_s for stage in step.stages) < step.total_s


def test_what_fails_to_load_leads_back(
    shared_cluster: ll.Cluster,
    tiny_llama: str,
    unsharded: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "checkpoint")
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as model:
        past, expected = model(IDS).past_key_values, unsharded(IDS).past_key_values
        os.truncate(folder / "model.safetensors", 1000)
        monkeypatch.setattr(Engine, "may_lend", lambda *names: False)  # nor do other workers give the weights
        with pytest.raises(ll.CheckpointError):
            model.rebalance(ll.Plan.from_spans([("a", 0, 1), ("b", 1, 4)]))
        assert model.plan.stages[0].end == 2
        assert "lends no weights" in model.telemetry.migrations[-1].error
        logits = model(IDS[:, :1], past_key_values=past).logits
        assert torch.equal(logits, unsharded(IDS[:, :1], past_key_values=expected).logits)


def test_a_device_that_dies_while_it_is_moved_to_leads_back(tiny_llama: str, unsharded: PreTrainedModel) -> None:
    devices = [device(name) for name in ("one", "two", "doomed")]
    plan = ll.Plan.from_spans([("one", 0, 2), ("two", 2, 4)])
    with ll.Cluster(devices) as cluster:
        pid = cluster.pids["doomed"]
        with ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model:
            past, expected = model(IDS).past_key_values, unsharded(IDS).past_key_values
            errors: list[Exception] = []

            def move() -> None:
                try:
                    model.rebalance(ll.Plan.from_spans([("one", 0, 2), ("doomed", 2, 4)]))
                except ll.WorkerDiedError as error:
                    errors.append(error)

            stopped(pid)  # it answers nothing: the migration waits for it
            thread = threading.Thread(target=move)
            thread.start()
            for _ in range(3):
                logits = model(IDS[:, :1], past_key_values=past).logits
                assert torch.equal(logits, unsharded(IDS[:, :1], past_key_values=expected).logits)
            os.kill(pid, signal.SIGKILL)
            thread.join(30)
            assert [type(error) for error in errors] == [ll.WorkerDiedError]
            assert model.plan.devices == ("one", "two")
            logits = model(IDS[:, :2], past_key_values=past).logits
            assert torch.equal(logits, unsharded(IDS[:, :2], past_key_values=expected).logits)


def kv_bytes_on(cluster: ll.Cluster, device: str) -> int:
    (found,) = inspect_workers(cluster._engine, [device], 30.0)
    return sum(stage.snapshot.kv_bytes for stage in found.stages)


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_kill_while_kv_is_copied(victim: str, tiny_llama: str, unsharded: PreTrainedModel) -> None:
    devices = [device(name) for name in ("first", "source", "target")]
    links = {("source", "target"): ll.Link(bandwidth="100KB/s")}
    before = ll.Plan.from_spans([("first", 0, 2), ("source", 2, 4)])
    long = torch.arange(1500).remainder(90).add(3)[None]
    tokens = generate(unsharded, "one row", 40)
    with (
        ll.Cluster(devices, links=links) as cluster,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=before, progress=False) as model,
        ThreadPoolExecutor(2) as pool,
    ):
        past, expected = model(long).past_key_values, unsharded(long).past_key_values
        model(IDS)  # another session, whose KV comes later
        moving = pool.submit(model.rebalance, ll.Plan.from_spans([("first", 0, 2), ("target", 2, 4)]))
        wait_until(lambda: kv_bytes_on(cluster, "target") > 0)
        assert not moving.done()
        talking = pool.submit(generate, model, "one row", 40)
        os.kill(cluster.pids[victim], signal.SIGKILL)
        with pytest.raises(ll.WorkerDiedError, match=f"worker on device '{victim}' died"):
            moving.result(30)
        if victim == "source":
            with pytest.raises(ll.WorkerDiedError, match="worker on device 'source' died"):
                talking.result(30)
            with pytest.raises(ll.WorkerDiedError, match="worker on device 'source' died"):
                model(IDS)
        else:
            assert torch.equal(talking.result(30), tokens)
            assert not model.telemetry.migrations[-1].succeeded
            assert model.plan.devices == ("first", "source")
            logits = model(IDS[:, :2], past_key_values=past).logits
            assert torch.equal(logits, unsharded(IDS[:, :2], past_key_values=expected).logits)


def test_a_session_that_is_ended_while_it_changes_leaves_nothing(tiny_llama: str, unsharded: PreTrainedModel) -> None:
    devices = [device(name) for name in ("first", "source", "target")]
    links = {("source", "target"): ll.Link(bandwidth="200KB/s")}
    plan = ll.Plan.from_spans([("first", 0, 2), ("source", 2, 4)])
    long = torch.arange(1500).remainder(90).add(3)[None]
    with (
        ll.Cluster(devices, links=links) as cluster,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model,
        ThreadPoolExecutor(1) as pool,
    ):
        past, expected = model(long).past_key_values, unsharded(long).past_key_values
        early = model(long).past_key_values
        moving = pool.submit(model.rebalance, ll.Plan.from_spans([("first", 0, 2), ("target", 2, 4)]))
        wait_until(lambda: kv_bytes_on(cluster, "target") > 0)
        early.end()  # while its KV is copied ahead
        late = model(long).past_key_values  # not copied ahead: all of its KV is sent when it changes
        routes = model._pipeline._routes
        wait_until(lambda: routes.target is not routes.current)
        kv_bytes = kv_bytes_on(cluster, "first")
        late.end()
        assert not moving.done()
        assert moving.result(60).migration.succeeded
        wait_until(lambda: num_sessions(model) == [1, 1])
        assert kv_bytes_on(cluster, "first") == kv_bytes / 2
        assert kv_bytes_on(cluster, "source") == 0
        logits = model(IDS[:, :2], past_key_values=past).logits
        assert torch.equal(logits, unsharded(IDS[:, :2], past_key_values=expected).logits)


def test_several_threads_may_move_it(moving: Any, unsharded: PreTrainedModel) -> None:
    plans = [ll.Plan.from_spans([(first, 0, 1), (second, 1, 4)]) for first, second in ("cd", "da", "bc", "ab")]
    threads = [threading.Thread(target=moving.rebalance, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    tokens = generate(moving, "one row", 20)
    for thread in threads:
        thread.join()
    assert torch.equal(tokens, generate(unsharded, "one row", 20))
    migrations = moving.telemetry.migrations
    assert len(migrations) == len(plans)
    assert migrations[-1].spans_after == tuple((each.device, each.start, each.end) for each in moving.plan.stages)


def test_word_of_its_end_may_come_before_word_of_its_move(tiny_llama: str) -> None:
    """The caller tells a slow device that a session moves, and the device before it in the pipeline that it ends."""
    links = {("caller", "b"): ll.Link(latency="300ms")}
    before, after = (ll.Plan.from_spans([("a", 0, end), ("b", end, 4)]) for end in (1, 2))
    with (
        ll.Cluster([device(name) for name in "ab"], links=links) as cluster,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=before, progress=False) as model,
    ):
        past = model(IDS).past_key_values
        model.rebalance(after)
        past.end()
        assert kv_bytes_on(cluster, "b") == 0  # asked behind both
        assert num_sessions(model) == [0, 0]


def test_telemetry_is_whole_while_layers_move(moving: Any) -> None:
    done = threading.Event()
    partial: list[Any] = []

    def look() -> None:
        while not done.is_set():
            stages = model_spans(moving.telemetry)
            if stages[0][0] != 0 or stages[-1][1] != NUM_LAYERS:
                partial.append(stages)

    def model_spans(telemetry: ll.Telemetry) -> list[tuple[int, int]]:
        return [(stage.start, stage.end) for stage in telemetry.stages] or [(-1, -1)]

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(8):
        moving.rebalance(ll.Plan.from_spans([("c", 0, 4)]))
        moving.rebalance(ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)]))
    done.set()
    thread.join()
    assert partial == []


def test_what_was_decided_is_told_with_what_was_done(moving: Any) -> None:
    same = moving.rebalance(ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)]))
    assert (same.action, same.migrations) == ("stay", ())
    moved = moving.rebalance(ll.Plan.from_spans([("c", 0, 4)]))
    assert len(moved.migrations) == 1
    assert moving.telemetry.decisions == (same, moved)


def test_a_closed_model_is_not_moved(moving: Any) -> None:
    moving.close()
    with pytest.raises(ll.ClosedError):
        moving.rebalance(ll.Plan.from_spans([("a", 0, 4)]))


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        (1, ll.ArgumentError, "must be a lingualinked.Plan"),
        ("even", ll.ArgumentError, "must be a lingualinked.Plan"),
        (ll.Plan.from_spans([("a", 0, 3)]), ll.InfeasiblePlanError, "places 3 layers, the model has 4"),
        (ll.Plan.from_spans([("nobody", 0, 4)]), ll.InfeasiblePlanError, "uses device 'nobody'"),
    ],
)
def test_what_is_no_plan_for_it_is_refused(moving: Any, plan: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        moving.rebalance(plan)
    assert moving.plan.devices == ("a", "b")


def test_token_ids_stay_on_trusted_devices(tiny_llama: str) -> None:
    devices = [device("home", trusted=True), device("foreign")]
    plan = ll.Plan.from_spans([("home", 0, 1), ("foreign", 1, 3), ("home", 3, 4)])
    with ll.Cluster(devices) as cluster:
        load = functools.partial(ll.ShardedModel.from_pretrained, tiny_llama, cluster=cluster, progress=False)
        with load(plan=plan) as model:
            with pytest.raises(ll.InfeasiblePlanError, match="'foreign', which is not trusted"):
                model.rebalance(ll.Plan.from_spans([("home", 0, 2), ("foreign", 2, 4)]))
            model.rebalance(ll.Plan.from_spans([("home", 0, 2), ("foreign", 2, 3), ("home", 3, 4)]))
        kept = ll.Workload(trusted_layers=(1, 2))
        with pytest.raises(ll.InfeasiblePlanError, match=r"\[1, 3\) on device 'foreign'.*trusted_layers=\(1, 2\)"):
            load(plan=plan, workload=kept)
        with load(plan=ll.Plan.from_spans([("home", 0, 1), ("foreign", 1, 2), ("home", 2, 4)]), workload=kept) as model:
            with pytest.raises(ll.InfeasiblePlanError, match=r"trusted_layers=\(1, 2\)"):
                model.rebalance(plan)
            model.rebalance(ll.Plan.from_spans([("home", 0, 4)]))
            assert model.plan.trusted_layers == (1, 2)

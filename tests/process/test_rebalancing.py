"""A pipeline that decides by itself, or when it is asked, where its layers are best."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

import lingualinked as ll
from lingualinked.cluster.measuring import profiling
from lingualinked.control.balancer import Balancer
from lingualinked.link_profile import LinkProfile
from lingualinked.protocol.measuring import ModelMeasured
from lingualinked.rounding import Rounding
from process.conftest import load_unsharded, save_random
from profiles import times
from waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow]

NUM_LAYERS = 12
IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
PROMPT = ll.Workload(prompt_tokens=8, new_tokens=40, num_sessions=8)  # which keep every device busy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose layers take long enough to be told apart from noise."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_random(config, tmp_path_factory.mktemp("twelve-layers"))


@pytest.fixture(scope="module")
def whole(checkpoint: str) -> PreTrainedModel:
    return load_unsharded(checkpoint)


@pytest.fixture(scope="module")
def three() -> Iterator[ll.Cluster]:
    with ll.Cluster([ll.Device(name=name, threads=1, slowdown=2.0) for name in "abc"]) as cluster:
        cluster.workers()  # an answer of each: connections stand both ways
        yield cluster


@pytest.fixture
def stated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices and links are as fast as they are made, and steps show nothing else: a busy machine decides nothing."""

    def measure_models(cluster: ll.Cluster, devices: Sequence[ll.Device], *_: object) -> list[ModelMeasured]:
        return [measured(cluster.as_it_behaves(device).slowdown) for device in devices]

    def measure_links(cluster: ll.Cluster, pairs: Sequence[tuple[str, str]], *_: object) -> tuple[LinkProfile, ...]:
        ends = [each for source, target in pairs for each in ((source, target), (target, source))]
        return tuple(
            LinkProfile(source=source, target=target, latency_s=1e-4, bandwidth_bytes_per_s=None)
            for source, target in ends
        )

    monkeypatch.setattr(profiling, "measure_models", measure_models)
    monkeypatch.setattr(profiling, "measure_links", measure_links)
    monkeypatch.setattr(Balancer, "_on_step", lambda *_: None)


def measured(slowdown: float) -> ModelMeasured:
    return ModelMeasured(
        request=0,
        hardware="stated",
        free_bytes=8 << 30,
        layers={0: times(1e-3 * slowdown)},
        stage=times(1e-4 * slowdown, per_token=0.0),
        prologue=times(5e-5 * slowdown, per_token=0.0),
        epilogue=times(5e-4 * slowdown, per_token=0.0),
        watts=None,
        power_source="nothing measures it",
        rounding=Rounding("", 0),
    )


def load(checkpoint: str, cluster: ll.Cluster, **arguments: Any) -> Any:
    arguments = {"workload": PROMPT, "progress": False, **arguments}
    return ll.ShardedModel.from_pretrained(checkpoint, cluster=cluster, **arguments)


def generate(model: Any, num_new: int = 40) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(IDS, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)
    return tokens


def answers_alike(model: Any, whole: PreTrainedModel) -> bool:
    """Whether eight sessions at once, which keep every device busy, give the tokens of the uncut model."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(generate, [model] * 8, [12] * 8))
    expected = generate(whole, 12)
    return all(torch.equal(answer, expected) for answer in answers)


def num_layers(model: Any, device: str) -> int:
    return sum(stage.num_layers for stage in model.plan.stages if stage.device == device)


@pytest.mark.timeout(300)
def test_layers_leave_a_device_that_slows_down_and_no_token_changes(
    checkpoint: str, whole: PreTrainedModel, three: ll.Cluster
) -> None:
    expected = generate(whole)
    # Here alone speeds are measured. On a busy machine all of them change all the time: that must not keep it from acting, and
    # the device slows down by more than what other work does to any.
    policy = ll.RebalancePolicy(cooldown_s=0.5, sample_interval_s=0.2, margin=0.0)
    enough = threading.Event()
    wrong: list[object] = []

    def keep_generating() -> None:
        while not enough.is_set() and not wrong:
            tokens = generate(model)
            if not torch.equal(tokens, expected):
                wrong.append(tokens)

    with load(checkpoint, three, plan="even", rebalance=policy) as model:
        generate(model)
        threads = [threading.Thread(target=keep_generating) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: model.telemetry.counters.decode.num_steps > 200, 90)
            before = num_layers(model, "b")
            three.throttle("b", slowdown=40.0)
            wait_until(lambda: num_layers(model, "b") < before / 2, 90)
        finally:
            enough.set()
            three.throttle("b", slowdown=2.0)
            for thread in threads:
                thread.join()
        telemetry = model.telemetry
        assert wrong == []
        assert any(each.action == "move" and "'b'" in each.trigger for each in telemetry.decisions)
        assert all(migration.succeeded for migration in telemetry.migrations)
        assert {sample.device for sample in telemetry.device_samples} == {"a", "b", "c"}
        assert all(sample.available_bytes > 0 for sample in telemetry.device_samples)


def test_asking_tells_what_would_be_done_and_does_it(
    checkpoint: str, whole: PreTrainedModel, three: ll.Cluster, stated: None
) -> None:
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4), ("c", 4, 12)])
    with load(checkpoint, three, plan=plan) as model:
        assert answers_alike(model, whole)
        said = model.rebalance(dry_run=True)
        assert said.action == "move"
        assert said.moves
        assert said.after_s < said.before_s
        assert model.plan.stages[2].start == 4
        done = model.rebalance()
        assert done.migration.succeeded
        assert num_layers(model, "c") < 8
        assert answers_alike(model, whole)
        model.rebalance()
        assert answers_alike(model, whole)
        assert [each.action for each in model.telemetry.decisions][:2] == ["move", "move"]
        assert str(done).startswith("move [")


def test_a_released_device_holds_nothing_while_sessions_go_on(
    checkpoint: str, whole: PreTrainedModel, three: ll.Cluster, stated: None
) -> None:
    with load(checkpoint, three, plan="even") as model:
        past, expected = model(IDS).past_key_values, whole(IDS).past_key_values
        decision = model.release("b")
        assert decision.migration.succeeded
        assert num_layers(model, "b") == 0
        logits = model(IDS[:, :2], past_key_values=past).logits
        assert torch.equal(logits, whole(IDS[:, :2], past_key_values=expected).logits)
        assert "b" not in model.plan.devices
        assert model.release("b").action == "stay"
        model.release("c")
        with pytest.raises(ll.InfeasiblePlanError, match="no usable device is left"):
            model.release("a")
        assert torch.equal(generate(model), generate(whole))
        with pytest.raises(ll.ArgumentError, match="no device 'z'"):
            model.release("z")


def test_a_device_is_brought_in_while_a_session_goes_on(checkpoint: str, whole: PreTrainedModel, stated: None) -> None:
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    with ll.Cluster(devices) as cluster, load(checkpoint, cluster) as model:
        past, expected = model(IDS).past_key_values, whole(IDS).past_key_values
        decision = model.admit(ll.Device(name="new", threads=1))
        assert decision.migration.succeeded
        assert num_layers(model, "new") > 0
        logits = model(IDS[:, :2], past_key_values=past).logits
        assert torch.equal(logits, whole(IDS[:, :2], past_key_values=expected).logits)
        assert answers_alike(model, whole)
        model.release("new")
        assert num_layers(model, "new") == 0
        assert model.admit("new").action == "move"
        slow = model.admit(ll.Device(name="slow", threads=1, slowdown=15.0))
        assert slow.action == "stay"
        assert "slow" not in model.plan.devices
        assert answers_alike(model, whole)
        for device, words in (
            ("nobody", "no device 'nobody'"),
            (3, "device=3"),
            (ll.Device(name="a"), "pass its name"),
        ):
            with pytest.raises(ll.ArgumentError, match=words):
                model.admit(device)


def test_a_device_that_is_gone_is_no_obstacle(
    checkpoint: str, whole: PreTrainedModel, stated: None, cache: Path
) -> None:
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 12)])
    devices = [ll.Device(name=name, threads=1) for name in "abc"]
    with ll.Cluster(devices) as cluster, load(checkpoint, cluster, plan=plan) as model:
        os.kill(cluster.pids["c"], signal.SIGKILL)
        wait_until(lambda: "c" in cluster._engine.ended_devices())
        assert model.rebalance().action == "move"
        with pytest.raises(ll.WorkerDiedError, match="'c' died"):
            model.admit("c")
        assert model.rebalance().action == "stay"
        assert set(model.plan.devices) == {"a", "b"}
        assert torch.equal(generate(model), generate(whole))
        assert list(cache.rglob("profile-*")) == []  # which would say that there are two devices


def test_devices_may_be_admitted_at_once(checkpoint: str, whole: PreTrainedModel, stated: None) -> None:
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    with (
        ll.Cluster(devices) as cluster,
        load(checkpoint, cluster) as model,
        ThreadPoolExecutor(2) as pool,
    ):
        new = [ll.Device(name=name, threads=1) for name in ("new", "newer")]
        assert all(decision.moves for decision in pool.map(model.admit, new))
        assert set(model.plan.devices) == {"a", "b", "new", "newer"}
        for device in new:
            model.release(device.name)
        assert set(model.plan.devices) == {"a", "b"}
        assert torch.equal(generate(model), generate(whole))


def test_a_profile_of_throttled_devices_is_not_kept(
    checkpoint: str, three: ll.Cluster, stated: None, cache: Path
) -> None:
    three.throttle("b", slowdown=8.0)
    try:
        with load(checkpoint, three) as model:
            assert num_layers(model, "b") < num_layers(model, "a")
    finally:
        three.throttle("b", slowdown=2.0)
    assert list(cache.rglob("*.json")) == []


def test_a_rebalancing_that_fails_keeps_nothing_alive(checkpoint: str) -> None:
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    with ll.Cluster(devices) as cluster:
        model = load(checkpoint, cluster, plan=ll.Plan.from_spans([("a", 0, 12)]))
        os.kill(cluster.pids["b"], signal.SIGKILL)
        pipeline = weakref.ref(model._pipeline)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(ll.WorkerDiedError):
                model.rebalance(ll.Plan.from_spans([("b", 0, 12)]))
            del model
            wait_until(lambda: pipeline() is None)
        finally:
            gc.enable()


def test_a_forked_child_can_not_rebalance(three: ll.Cluster, checkpoint: str) -> None:
    with load(checkpoint, three, plan="even") as model:
        pid = os.fork()
        if pid == 0:
            calls = (lambda: model.rebalance(dry_run=True), lambda: model.release("a"), lambda: model.admit("a"))
            refused = 0
            for call in calls:
                try:
                    call()
                except ll.UnsupportedOperationError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


def test_layers_pass_each_other_within_memory_limits(checkpoint: str, whole: PreTrainedModel) -> None:
    """Each device has room for hardly more than its own layers: they can't be exchanged in one move."""
    devices = [ll.Device(name=name, threads=1, memory="34MiB" if name != "c" else "16MiB") for name in "abc"]
    plan = ll.Plan.from_spans([("a", 0, 6), ("b", 6, 12)])
    one = dataclasses.replace(PROMPT, num_sessions=1)
    with ll.Cluster(devices) as cluster, load(checkpoint, cluster, plan=plan, workload=one) as model:
        past, expected = model(IDS).past_key_values, whole(IDS).past_key_values
        decision = model.rebalance(ll.Plan.from_spans([("b", 0, 6), ("a", 6, 12)]))
        assert len(decision.migrations) > 1
        assert model.plan.devices == ("b", "a")
        logits = model(IDS[:, :2], past_key_values=past).logits
        assert torch.equal(logits, whole(IDS[:, :2], past_key_values=expected).logits)


def test_a_closed_model_decides_nothing(checkpoint: str, three: ll.Cluster) -> None:
    model = load(checkpoint, three, plan="even", rebalance="auto")
    model.close()
    for call in (model.rebalance, lambda: model.release("a")):
        with pytest.raises(ll.ClosedError):
            call()


@pytest.mark.parametrize("rebalance", ["yes", True, 1.0, {}])
def test_what_is_no_policy_is_refused(rebalance: object, three: ll.Cluster) -> None:
    with pytest.raises(ll.ArgumentError, match="rebalance="):
        ll.ShardedModel.from_pretrained("anything", cluster=three, rebalance=rebalance)  # type: ignore[arg-type]

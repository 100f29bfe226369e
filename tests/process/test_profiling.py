"""Models are measured on workers, profiles and plans are kept on disk, and a model is placed by them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import pwd
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.measuring import profiling
from lingualinked.cluster.measuring.profiling import measured_spans
from lingualinked.cluster_file import ClusterDescription
from lingualinked.cluster_file_writer import write_cluster_file
from lingualinked.model.cutting.footprint import Footprint
from lingualinked.module_times import ModuleTimes
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.describing import describe
from lingualinked.sharded.profiles import saved
from lingualinked.transmission import Transmission
from lingualinked.worker.measuring.power import RaplCounter
from profiles import MIB, model_profile

pytestmark = [pytest.mark.process, pytest.mark.slow]

SLOW = ll.Link(latency="40ms")
WORKLOAD = ll.Workload(prompt_tokens=8, new_tokens=8)


def pair_of_devices() -> list[ll.Device]:
    return [ll.Device(name="here", threads=1), ll.Device(name="there", threads=1, slowdown=4.0, latency="2ms")]


@pytest.fixture(scope="module")
def pair(nothing_outlives_the_session: None) -> Iterator[ll.Cluster]:
    """For tests that leave it as it is."""
    with ll.Cluster(pair_of_devices()) as cluster:
        cluster.workers()  # an answer of each: connections stand both ways
        yield cluster


@pytest.fixture
def own_pair() -> Iterator[ll.Cluster]:
    with ll.Cluster(pair_of_devices()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two_alike(nothing_outlives_the_session: None) -> Iterator[ll.Cluster]:
    """Two equal devices: of a model, that is enough to see that each of several is measured."""
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "ab"]) as cluster:
        cluster.workers()
        yield cluster


def test_every_device_and_link_is_measured(cache: Path, pair: ll.Cluster, tiny_llama: str) -> None:
    profile = ll.profile_model(tiny_llama, pair, workload=WORKLOAD)
    assert profile.names == ("here", "there")
    assert profile.model.num_layers == 4
    assert set(profile.versions) == {"lingualinked", "torch", "transformers"}
    shapes = {(1, 8, 0), (1, 1, 8), (1, 1, 16)}
    for device in profile.devices:
        for times in (*device.layers, device.stage, device.prologue, device.epilogue):
            assert {(step.rows, step.tokens, step.context) for step in times.steps} == shapes
        assert all(step.seconds > 0 for step in device.layers[0].steps)
        assert all(step.spread_s > 0 for step in device.layers[0].steps)  # each was measured more than once
        assert device.free_bytes is not None
        assert (device.measured_watts is None) == (device.power_source != RaplCounter.source)  # or why there are none
    assert len(profile.links) == 6
    for link in profile.links:
        emulated = 2e-3 if "there" in (link.source, link.target) else 0.0
        assert link.latency_s >= emulated


def test_a_link_may_be_slower_one_way(cache: Path, tiny_llama: str) -> None:
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    slow = ll.Link(latency="40ms", bandwidth="1MB/s")
    with ll.Cluster(devices, links={("a", "b"): slow}) as cluster:
        profile = ll.profile_model(tiny_llama, cluster, workload=WORKLOAD)
    there, back = profile.link("a", "b"), profile.link("b", "a")
    assert there.latency_s >= 0.04
    assert back.latency_s < 0.04
    assert there.bandwidth_bytes_per_s is not None
    # A link is never faster than it is made; where a small message comes late, a large one seems to have come sooner.
    assert there.bandwidth_bytes_per_s <= 1e6 * 1.2
    assert back.bandwidth_bytes_per_s is None or back.bandwidth_bytes_per_s > there.bandwidth_bytes_per_s


def footprint_of(path: str) -> Footprint:
    return describe(LoadArguments(path=path)).footprint()


def test_a_profile_is_extended_by_a_device_that_is_added(own_pair: ll.Cluster, tiny_llama: str, cache: Path) -> None:
    profile = ll.profile_model(tiny_llama, own_pair, workload=WORKLOAD)
    own_pair.add(ll.Device(name="late", threads=1, slowdown=2.0, latency="3ms"), links={("late", "here"): SLOW})
    own_pair.add(ll.Device(name="later", threads=1))
    asked: list[tuple[str, str]] = []
    request = own_pair._engine.request

    def note(device: str, message: Any, what: str, *rest: Any, **more: Any) -> Any:
        asked.append((device, what))
        return request(device, message, what, *rest, **more)

    footprint = footprint_of(tiny_llama)
    own_pair._engine.request = note  # type: ignore[method-assign]
    extended = profiling.extend_profile(own_pair, footprint, profile, "late", WORKLOAD)
    assert asked == [
        ("late", "measuring a model's parts"),
        ("late", "measuring the link to 'caller'"),
        ("late", "measuring the link to 'here'"),
        ("late", "measuring the link to 'there'"),
    ]
    assert extended.names == ("here", "there", "late")
    assert extended.without("late") == profile  # what was there is kept
    assert extended.device("late").device == own_pair.device("late")
    assert [step.seconds > 0 for step in extended.device("late").layers[0].steps] == [True] * 3
    assert extended.link("late", "here").latency_s >= 0.04
    assert 0.003 <= extended.link("here", "late").latency_s < 0.04
    assert extended.link("late", "there").latency_s >= 0.005
    assert extended.link("caller", "late").latency_s >= 0.003
    plan = ll.solve(profiling.extend_profile(own_pair, footprint, extended, "later", WORKLOAD), workload=WORKLOAD)
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=own_pair, plan=plan, progress=False) as model:
        assert model(torch.tensor([[5, 9]])).logits.shape == (1, 2, 128)


def test_devices_and_links_that_are_alike_are_taken_together(tiny_llama: str, cache: Path) -> None:
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "abc"]) as cluster:
        profile = ll.profile_model(tiny_llama, cluster, workload=WORKLOAD)
        cluster.add(ll.Device(name="d", threads=1))
        extended = profiling.extend_profile(cluster, footprint_of(tiny_llama), profile, "d", WORKLOAD)
    # Three have the same figures, and one measurement more does not outvote them.
    assert extended.device("d").layers == extended.device("a").layers
    assert extended.link("d", "a").latency_s == profile.link("a", "b").latency_s


def test_what_can_not_be_extended(own_pair: ll.Cluster, tiny_llama: str, cache: Path) -> None:
    profile = ll.profile_model(tiny_llama, own_pair, workload=WORKLOAD)
    footprint = footprint_of(tiny_llama)
    extend = functools.partial(profiling.extend_profile, own_pair, footprint)
    with pytest.raises(ll.ArgumentError, match="'there' is in the profile already"):
        extend(profile, "there", WORKLOAD)
    with pytest.raises(ll.ArgumentError, match="no device 'moon'"):
        extend(profile, "moon", WORKLOAD)
    other = dataclasses.replace(profile, model=dataclasses.replace(profile.model, fingerprint="other"))
    with pytest.raises(ll.ArgumentError, match="the profile is of another model"):
        extend(other.without("there"), "there", WORKLOAD)
    os.kill(own_pair.pids["here"], signal.SIGKILL)
    with pytest.raises(ll.WorkerDiedError, match="'here'"):
        extend(profile.without("there"), "there", WORKLOAD)


def test_bytes_are_those_that_a_running_model_holds(shared_cluster: ll.Cluster, tiny_llama: str) -> None:
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan=plan, progress=False) as model:
        past = model(torch.tensor([[5] * 64])).past_key_values
        stages = model.telemetry.stages
        described = ll.profile_model(model, shared_cluster, workload=WORKLOAD).model
        for stage in stages:
            assert stage.weight_bytes == described.span_bytes(stage.start, stage.end)
            assert stage.kv_bytes == 64 * sum(described.layer_kv_bytes[stage.start : stage.end])
        del past


def test_a_second_start_measures_nothing(cache: Path, pair: ll.Cluster, tiny_llama: str, monkeypatch: Any) -> None:
    first = ll.profile_model(tiny_llama, pair, workload=WORKLOAD)
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=pair, workload=WORKLOAD, progress=False) as model:
        plan = model.plan
        assert model.profile == first
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["plan", "profile"]

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(saved, "profile_devices", refuse)
    assert ll.profile_model(tiny_llama, pair, workload=WORKLOAD) == first
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=pair, workload=WORKLOAD, progress=False) as model:
        assert model.plan == plan
    with pytest.raises(AssertionError, match="measured again"):
        ll.profile_model(tiny_llama, pair, workload=WORKLOAD, refresh=True)
    with pytest.raises(AssertionError, match="measured again"):
        ll.profile_model(tiny_llama, pair, workload=WORKLOAD, dtype="bfloat16")


def test_a_cluster_file_is_measured_or_estimated(
    cache: Path, pair: ll.Cluster, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = ll.profile_model(tiny_llama, pair, workload=WORKLOAD)
    file = tmp_path / "cluster.toml"
    described = ClusterDescription(
        devices=pair.devices,
        links=pair.links,
        specs={device.name: ll.DeviceSpecs(flops="1TFLOP/s", memory_bandwidth="10GB/s") for device in pair.devices},
    )
    write_cluster_file(file, described)
    estimated = ll.estimate_profile(tiny_llama, str(file), workload=WORKLOAD)
    assert [each.device for each in estimated.devices] == list(pair.devices)
    assert estimated.link("caller", pair.devices[0].name).latency_s > 0
    monkeypatch.setattr(Cluster, "__init__", None)  # no worker is started where a profile is on disk
    assert ll.profile_model(tiny_llama, file, workload=WORKLOAD) == measured


def test_a_doubtful_profile_is_not_kept_and_the_first_requests_correct_it(
    cache: Path, pair: ll.Cluster, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine was busy: steps measured 40 times too long, and the plan says so until requests have shown better."""
    measure = profiling.profile_devices

    def slower(times: ModuleTimes) -> ModuleTimes:
        return ModuleTimes(tuple(dataclasses.replace(step, seconds=40 * step.seconds) for step in times.steps))

    def measured_while_busy(*arguments: Any) -> ll.Profile:
        made = measure(*arguments)
        devices = [
            dataclasses.replace(
                each, layers=tuple(map(slower, each.layers)), stage=slower(each.stage), epilogue=slower(each.epilogue)
            )
            for each in made.devices
        ]
        return dataclasses.replace(made, devices=tuple(devices), doubt="other processes kept 2.0 of 2 cores busy")

    monkeypatch.setattr(saved, "profile_devices", measured_while_busy)
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=pair, workload=WORKLOAD, progress=False) as model:
        assert list(cache.glob("*")) == []
        doubtful = model.plan
        assert "Doubtful: other processes kept 2.0 of 2 cores busy" in str(doubtful)
        model.generate(torch.tensor([[5] * 8]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        corrected = model.plan
        steps = model.telemetry.history.steps
        assert model.plan.profile is corrected.profile  # nothing new: nothing is worked out again
        for stage, before in zip(corrected.predicted.stages, doubtful.predicted.stages, strict=True):
            for is_decode, predicted_s, doubtful_s in (
                (True, stage.decode_s, before.decode_s),
                (False, stage.prefill_s, before.prefill_s),
            ):
                seen_s = statistics.median(
                    timing.compute_s
                    for step in steps
                    for timing in step.stages
                    if step.is_decode == is_decode and timing.device == stage.device
                )
                # Nearer by half the orders of magnitude: on a machine that is really busy no two steps take the same time.
                assert abs(math.log(predicted_s / seen_s)) < abs(math.log(doubtful_s / seen_s)) / 2
        unseen = set(pair.pids) - set(corrected.devices)
        assert bool(corrected.profile.doubt) == bool(unseen)  # who has run no step is doubtful still
        assert corrected.stages == doubtful.stages
        assert model.rebalance(dry_run=True).dry_run  # decided by what steps have shown


def test_a_model_of_few_positions_and_words_is_measured(cache: Path, two_alike: ll.Cluster, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=4, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for workload in (ll.Workload(prompt_tokens=1, new_tokens=3), ll.Workload(prompt_tokens=3, new_tokens=1)):
        assert ll.profile_model(tmp_path, two_alike, workload=workload).model.max_positions == 4
    with pytest.raises(ll.ArgumentError, match="exceed the 4 positions"):
        ll.profile_model(tmp_path, two_alike, workload=ll.Workload(prompt_tokens=3, new_tokens=2))


def test_a_damaged_file_is_measured_anew(cache: Path, pair: ll.Cluster, tiny_llama: str) -> None:
    ll.profile_model(tiny_llama, pair, workload=WORKLOAD)
    (path,) = cache.iterdir()
    path.write_text("{")
    again = ll.profile_model(tiny_llama, pair, workload=WORKLOAD)
    assert ll.Profile.load(path) == again


def test_a_folder_that_can_not_be_written_is_no_error(
    pair: ll.Cluster, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=pair, workload=WORKLOAD, progress=False) as model:
        assert model.profile is not None


def test_a_user_without_a_home_is_no_error(pair: ll.Cluster, tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=pair, workload=WORKLOAD, progress=False) as model:
        assert model.profile is not None


@pytest.mark.parametrize("family", ["gemma2", "bloom", "mixtral", "gpt2", "opt", "qwen2"])
def test_every_kind_of_layer_is_measured(
    family: str, cache: Path, two_alike: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = save_tiny(family, torch.bfloat16, tmp_path_factory.mktemp(family))
    profile = ll.profile_model(path, two_alike, workload=ll.Workload(prompt_tokens=4, new_tokens=4, batch_size=2))
    for device in profile.devices:
        assert len(device.layers) == len(profile.model.kinds)
        assert all(step.seconds > 0 for times in device.layers for step in times.steps)
        assert {step.rows for step in device.layers[0].steps} == {1, 2}


def test_a_plan_of_another_model_is_refused(pair: ll.Cluster, tiny_llama: str, cache: Path) -> None:
    profile = ll.profile_model(tiny_llama, pair, workload=WORKLOAD)
    other = dataclasses.replace(profile, model=dataclasses.replace(profile.model, fingerprint="other"))
    with pytest.raises(ll.InfeasiblePlanError, match="from a profile of another model"):
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=pair, plan=ll.solve(other), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": "odd"}, "plan='odd' must be"),
        ({"plan": 3}, "plan=3 must be"),
        ({"objective": "speed"}, "objective='speed' must be one of"),
        ({"workload": 3}, "workload is a int"),
    ],
)
def test_arguments_are_refused_before_anything_starts(tiny_llama: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ArgumentError, match=message):
        ll.ShardedModel.from_pretrained(tiny_llama, devices=2, **arguments)


@pytest.mark.parametrize("arguments", [{"plan": "even"}, {"rebalance": "auto", "seed": 1}, {"objective": "latency"}])
def test_arguments_without_effect_on_a_profile_are_refused(
    tiny_llama: str, pair: ll.Cluster, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ll.ArgumentError, match="does not depend on " + ", ".join(sorted(arguments))):
        ll.profile_model(tiny_llama, pair, **arguments)
    with pytest.raises(ll.ArgumentError, match="does not depend on"):
        ll.estimate_profile(tiny_llama, [ll.Device(name="a")], {}, **arguments)


def test_a_loaded_model_is_measured_as_it_is(tiny_llama: str, pair: ll.Cluster) -> None:
    with (
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=pair, progress=False) as model,
        pytest.raises(ll.ArgumentError, match="leave out dtype"),
    ):
        ll.profile_model(model, pair, dtype="float32")


def test_what_fits_nowhere_is_refused_before_a_process_starts(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for the weights, or for the KV that is asked for; on devices, or on a cluster that runs."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(ll.Cluster, "__init__", refuse)
    small = [ll.Device(name=name, threads=1, memory="20KiB") for name in "ab"]
    for plan in (None, "even", ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])):
        for place in ({"devices": small}, {"cluster": SimpleNamespace(devices=small)}):
            with pytest.raises(ll.InfeasiblePlanError, match=r"need at least .*, but 'a', 'b' have 40.0 KiB") as caught:
                ll.ShardedModel.from_pretrained(tiny_llama, plan=plan, **place)
            assert caught.value.missing_bytes > 0
    large = [ll.Device(name=name, threads=1, memory="1MiB") for name in "ab"]
    workload = ll.Workload(prompt_tokens=10_000, new_tokens=10_000)
    with pytest.raises(ll.InfeasiblePlanError, match="the KV of 1 x 20,000 tokens need"):
        ll.ShardedModel.from_pretrained(tiny_llama, devices=large, workload=workload)


def test_what_headers_do_not_tell_is_refused_before_workers_are_waited_for(
    tiny_llama: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights from a config: known once it is read, while the workers are still starting."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was waited for")

    monkeypatch.setattr("lingualinked.cluster.messaging.engine.Engine.wait_for_worker", refuse)
    devices = [ll.Device(name=name, threads=1, memory="20KiB") for name in "ab"]
    with pytest.raises(ll.InfeasiblePlanError, match="one more device of at least"):
        ll.ShardedModel.from_pretrained(tiny_llama, devices=devices, load_format="dummy", progress=False)


def test_spans_show_every_kind_and_both_ends_within_memory() -> None:
    alike = model_profile(8)
    assert measured_spans(alike, None) == ((0, 2), (7, 8))
    assert measured_spans(model_profile(2), None) == ((0, 2),)
    assert measured_spans(model_profile(1), None) == ((0, 1),)
    assert measured_spans(alike, 20 * MIB) == ((4, 5),)
    mixed = dataclasses.replace(alike, kinds=("A", "B", "C"), kind_of_layer=(0, 1, 2, 1, 0, 1, 0, 1))
    spans = measured_spans(mixed, None)
    assert {mixed.kind_of_layer[end - 1] for start, end in spans if end - start == 2} == {0, 1, 2}
    assert (7, 8) in spans
    together = dataclasses.replace(mixed, transmission=Transmission(forbidden_cuts=(5, 6, 7)))
    spans = measured_spans(together, None)
    assert not {start for start, _ in spans} & {5, 6, 7}
    assert {mixed.kind_of_layer[end - 1] for start, end in spans if end - start > 1} == {0, 1, 2}
    assert measured_spans(dataclasses.replace(alike, transmission=Transmission(forbidden_cuts=(4,))), 20 * MIB) == (
        (3, 5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "opt"])
def test_models_of_few_positions_and_of_experts_are_planned_by_default(
    family: str,
    dtype: torch.dtype,
    cache: Path,
    two_alike: ll.Cluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = save_tiny(family, dtype, tmp_path_factory.mktemp(family))
    ids = torch.tensor([[5, 9, 11]])
    with ll.ShardedModel.from_pretrained(path, cluster=two_alike, progress=False) as model:
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        limit = model.profile.model.max_positions
        assert limit is None or model.plan.workload.num_tokens <= limit
    assert torch.equal(tokens, reference(path).generate(ids, max_new_tokens=6, do_sample=False))
    if limit is not None:
        for exact in (
            ll.Workload(prompt_tokens=limit - 1, new_tokens=1),
            ll.Workload(prompt_tokens=1, new_tokens=limit - 1),
        ):
            ll.profile_model(path, two_alike, workload=exact)
        with pytest.raises(ll.ArgumentError, match=f"exceed the {limit} positions"):
            ll.profile_model(path, two_alike, workload=ll.Workload(prompt_tokens=limit, new_tokens=1))


def test_profiles_may_be_made_by_several_threads_at_once(cache: Path, pair: ll.Cluster, tiny_llama: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ll.profile_model, tiny_llama, pair, workload=WORKLOAD, refresh=True) for _ in range(4)]
        assert {future.result(60).model.num_layers for future in futures} == {4}


def test_a_worker_that_dies_ends_the_measuring(cache: Path, tiny_llama: str) -> None:
    with ll.Cluster([ll.Device(name="a", threads=1), ll.Device(name="b", threads=1)]) as cluster:
        cluster.wait()
        os.kill(cluster.pids["b"], signal.SIGKILL)
        with pytest.raises(ll.WorkerDiedError, match="'b'"):
            ll.profile_model(tiny_llama, cluster, workload=WORKLOAD)

"""What `model.telemetry` returns can be taken away as plain data, as a data frame, and to Prometheus."""

from __future__ import annotations

import json
import sys
import types

import pytest
from prometheus_client.parser import text_string_to_metric_families

import lingualinked as ll
from histories import recorded, step
from lingualinked.telemetry.history import History
from lingualinked.telemetry.metrics import Reading
from lingualinked.telemetry.plain import plain
from lingualinked.telemetry.recorder import Recorder
from lingualinked.telemetry.samples import DeviceSample


def telemetry(history: History | None = None) -> ll.Telemetry:
    names = ("laptop", "phone", "nas")
    return ll.Telemetry(
        stages=tuple(
            ll.StageSnapshot(
                device=name,
                start=8 * index,
                end=8 * index + 8,
                weight_bytes=1000 + index,
                kv_bytes=2000,
                num_sessions=2,
                num_steps=10,
                compute_s=1.0,
                sent_bytes=4096,
            )
            for index, name in enumerate(names)
        ),
        workers=tuple(
            ll.WorkerSnapshot(device=name, pid=1, threads=2, resident_bytes=5000, idle_resident_bytes=1, num_refused=3)
            for name in names
        ),
        history=history or History(),
    )


def samples_of(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"lingualinked_{name}", frozenset(labels.items())


def test_telemetry_without_a_history_has_an_empty_one() -> None:
    bare = ll.Telemetry(stages=(), workers=())
    assert (bare.steps, bare.device_samples, bare.decisions, bare.migrations) == ((), (), (), ())
    assert bare.tokens_per_s() == bare.counters.num_steps == 0
    assert bare.utilisation() == {}


def test_telemetry_gives_what_was_recorded() -> None:
    history = recorded(200)
    live = telemetry(history)
    assert live.steps is history.steps
    assert live.device_samples is history.devices
    assert live.decisions is history.decisions
    assert live.migrations is history.migrations
    assert live.counters is history.counters
    assert live.tokens_per_s(2.0) == history.tokens_per_s(2.0) > 0
    assert live.utilisation(2.0) == history.utilisation(2.0)


def test_plain_data_is_ready_for_json() -> None:
    live = telemetry(recorded(100))
    data = json.loads(json.dumps(live.to_dict(), allow_nan=False))
    history = data["history"]
    assert history["migrations"][0]["spans_after"][0] == ["laptop", 0, 11]
    assert history["steps"][-1]["stages"][0]["compute_s"] == live.steps[-1].stages[0].compute_s
    assert history["decisions"][0]["slowdowns"]["phone"] == 4.1
    assert history["counters"]["devices"]["nas"]["num_visits"] == 100


def test_any_mapping_is_plain_data_and_an_object_is_not() -> None:
    assert plain({"a": types.MappingProxyType({"b": 1})}) == {"a": {"b": 1}}
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})


def test_steps_are_a_data_frame() -> None:
    live = telemetry(recorded(100))
    frame = live.to_pandas()
    assert list(frame.columns) == [
        *("time_s", "session", "number", "plan_version", "rows", "tokens", "context", "total_s"),
        *("stage", "device", "start", "end", "hop_s", "wait_s", "compute_s", "codec_s", "sent_bytes"),
    ]
    assert len(frame) == 300
    assert frame["device"].tolist()[:3] == ["laptop", "phone", "nas"]
    assert frame["stage"].tolist()[:3] == [0, 1, 2]
    assert frame["compute_s"].sum() == pytest.approx(sum(totals.compute_s for totals in live.counters.devices.values()))
    assert frame["sent_bytes"].dtype == frame["number"].dtype == "int64"
    assert frame["wait_s"].dtype == "float64"


def test_no_steps_are_an_empty_data_frame_of_the_same_columns() -> None:
    empty, full = telemetry().to_pandas(), telemetry(recorded(3)).to_pandas()
    assert len(empty) == 0
    assert empty.dtypes.to_dict() == full.dtypes.to_dict()


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ll.ArgumentError, match=r"lingualinked\[pandas\]"):
        telemetry().to_pandas()


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ll.ArgumentError, match=r"pip install 'lingualinked\[metrics\]'"):
        telemetry().prometheus()
    with pytest.raises(ll.ArgumentError, match=r"pip install 'lingualinked\[metrics\]'"):
        ll.MetricsEndpoint(Reading, 0, "127.0.0.1")


def test_prometheus_reads_the_totals() -> None:
    live = telemetry(recorded(400))
    samples = samples_of(live.prometheus())
    counters = live.counters
    assert samples[key("steps_total", kind="decode")] == counters.decode.num_steps == 398
    assert samples[key("tokens_total", kind="prefill")] == 2 * 128
    assert samples[key("stage_seconds_total", device="phone", part="compute")] == counters.devices["phone"].compute_s
    assert samples[key("sent_bytes_total", device="nas")] == 400 * 4096
    assert samples[key("decisions_total", action="move")] == 1
    assert samples[key("migrations_total", outcome="succeeded")] == 1
    assert samples[key("migrations_total", outcome="failed")] == 0
    assert samples[key("moved_layers_total")] == 6
    assert samples[key("migration_stall_seconds_total")] == 0.06


def test_prometheus_reads_the_present_state() -> None:
    samples = samples_of(telemetry(recorded(400)).prometheus())
    assert samples[key("stage_layers", stage="1", device="phone")] == 8
    assert samples[key("stage_kv_bytes", stage="2", device="nas")] == 2000
    assert samples[key("worker_resident_bytes", device="laptop")] == 5000
    assert samples[key("worker_refused_total", device="laptop")] == 3
    assert samples[key("device_temperature_celsius", device="phone")] == 41.0 + 3.75
    assert samples[key("device_battery_ratio", device="phone")] == pytest.approx((80 - 3.75) / 100)
    assert samples[key("device_on_battery", device="phone")] == 1
    assert samples[key("device_cpu_ratio", device="nas")] == 0.7
    assert key("device_temperature_celsius", device="nas") not in samples


def test_prometheus_families_are_named_by_the_rules() -> None:
    text = telemetry(recorded(400)).prometheus()
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation
        assert family.type in {"counter", "gauge"}
        assert all(sample.name.endswith("_total") == (family.type == "counter") for sample in family.samples)


def test_prometheus_reads_any_name_of_a_device() -> None:
    recorder = Recorder()
    name = 'a "b"\\n\\\n}'
    recorder.add_step(step())
    recorder.add_device(DeviceSample(time_s=1.0, device=name, held_bytes=7, available_bytes=8, cpu_percent=0.0))
    samples = samples_of(ll.Telemetry(stages=(), workers=(), history=recorder.history()).prometheus())
    assert samples[key("device_held_bytes", device=name)] == 7
    assert samples[key("sent_bytes_total", device='"b"\\')] == 4096


def test_prometheus_forgets_the_state_of_devices_that_are_gone() -> None:
    recorder = Recorder()
    recorder.add_device(DeviceSample(time_s=1.0, device="gone", held_bytes=7, available_bytes=8, cpu_percent=0.0))
    assert "gone" not in telemetry(recorder.history()).prometheus()


def test_a_pipeline_that_has_run_nothing_is_scraped() -> None:
    samples = samples_of(ll.Telemetry(stages=(), workers=()).prometheus())
    assert samples[key("steps_total", kind="decode")] == 0

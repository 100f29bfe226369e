"""Counters and gauges of a pipeline, as metric families of prometheus_client.

Knows that library, an extra that is imported on first use; neither who asks for metrics nor where they are served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lingualinked.errors import ArgumentError
from lingualinked.telemetry.history import Counters, History
from lingualinked.telemetry.reports import StageSnapshot, WorkerSnapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

# Names and units follow https://prometheus.io/docs/practices/naming. Labels are names of devices, positions of stages, and
# the words written here, so that there are never more series than devices, times stages at most.
_METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "up": ("1 if every worker answered this scrape; 0 if metrics of workers are the last known ones.", ()),
    "steps_total": ("Completed steps.", ("kind",)),
    "tokens_total": ("Tokens of all steps, over all rows.", ("kind",)),
    "step_seconds_total": ("Seconds from request to answer, over all steps.", ("kind",)),
    "visits_total": ("Stages that steps passed through.", ("device",)),
    "stage_seconds_total": ("Seconds that steps spent on a device, by part.", ("device", "part")),
    "sent_bytes_total": ("Bytes sent by a device to the next stage, before encryption.", ("device",)),
    "decisions_total": ("Decisions of the balancer.", ("action",)),
    "migrations_total": ("Migrations that ended.", ("outcome",)),
    "moved_layers_total": ("Layers moved between devices.", ()),
    "migration_stall_seconds_total": (
        "Longest wait of a session for its switch, summed over all migrations.",
        (),
    ),
    "stage_layers": ("Layers of a stage.", ("stage", "device")),
    "stage_first_layer": ("Index of its first layer.", ("stage", "device")),
    "stage_weight_bytes": ("Bytes of its weights.", ("stage", "device")),
    "stage_kv_bytes": ("Bytes of its KV cache.", ("stage", "device")),
    "stage_sessions": ("Sessions that hold KV there.", ("stage", "device")),
    "worker_threads": ("Threads that a worker computes with.", ("device",)),
    "worker_resident_bytes": ("Resident memory of a worker.", ("device",)),
    "worker_refused_total": ("Messages and connections that a worker refused.", ("device",)),
    "device_held_bytes": ("Memory held for stages.", ("device",)),
    "device_available_bytes": ("Memory still available.", ("device",)),
    "device_cpu_ratio": ("Cores kept busy by a worker.", ("device",)),
    "device_temperature_celsius": ("Temperature of the hottest sensor.", ("device",)),
    "device_battery_ratio": ("Charge of the battery.", ("device",)),
    "device_on_battery": ("1 if the device runs on battery.", ("device",)),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The records that metrics are computed from, as in `lingualinked.Telemetry`."""

    stages: tuple[StageSnapshot, ...] = ()
    workers: tuple[WorkerSnapshot, ...] = ()
    history: History = dataclasses.field(default_factory=History)
    is_current: bool | None = None  # whether all workers have just answered; None: unknown


def new_registry(read: Callable[[], Reading]) -> CollectorRegistry:
    """Make a registry for one pipeline, which calls ``read`` for each collection."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise ArgumentError("metrics need prometheus_client: pip install 'lingualinked[metrics]'") from error

    class PipelineCollector(Collector):
        def collect(self) -> Iterable[Metric]:
            return _families(read())

        def describe(self) -> Iterable[Metric]:
            return _Page().families()

    registry = CollectorRegistry()
    registry.register(PipelineCollector())
    return registry


def metrics_text(reading: Reading) -> str:
    """Format metrics as Prometheus' text."""
    registry = new_registry(lambda: reading)
    from prometheus_client import generate_latest

    return generate_latest(registry).decode()


class _Page:
    """All metric families, to which samples are added."""

    def __init__(self) -> None:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        self._families = {
            name: (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                f"lingualinked_{name}", about, labels=labels
            )
            for name, (about, labels) in _METRICS.items()
        }

    def add(self, name: str, value: float, *labels: str) -> None:
        self._families[name].add_metric(labels, value)

    def families(self) -> Iterable[Metric]:
        return self._families.values()


def _families(reading: Reading) -> Iterable[Metric]:
    page = _Page()
    if reading.is_current is not None:
        page.add("up", reading.is_current)
    _add_counters(page, reading.history.counters)
    for index, stage in enumerate(reading.stages):
        labels = str(index), stage.device
        page.add("stage_layers", stage.end - stage.start, *labels)
        page.add("stage_first_layer", stage.start, *labels)
        page.add("stage_weight_bytes", stage.weight_bytes, *labels)
        page.add("stage_kv_bytes", stage.kv_bytes, *labels)
        page.add("stage_sessions", stage.num_sessions, *labels)
    _add_devices(page, reading)
    return page.families()


def _add_counters(page: _Page, counters: Counters) -> None:
    for kind, steps in (("decode", counters.decode), ("prefill", counters.prefill)):
        page.add("steps_total", steps.num_steps, kind)
        page.add("tokens_total", steps.num_tokens, kind)
        page.add("step_seconds_total", steps.total_s, kind)
    for device, totals in counters.devices.items():
        page.add("visits_total", totals.num_visits, device)
        page.add("stage_seconds_total", totals.hop_s, device, "hop")
        page.add("stage_seconds_total", totals.wait_s, device, "wait")
        page.add("stage_seconds_total", totals.compute_s, device, "compute")
        page.add("stage_seconds_total", totals.codec_s, device, "codec")
        page.add("sent_bytes_total", totals.sent_bytes, device)
    page.add("decisions_total", counters.num_moves, "move")
    page.add("decisions_total", counters.num_stays, "stay")
    page.add("migrations_total", counters.num_migrations, "succeeded")
    page.add("migrations_total", counters.num_failed_migrations, "failed")
    page.add("moved_layers_total", counters.num_moved_layers)
    page.add("migration_stall_seconds_total", counters.stall_s)


def _add_devices(page: _Page, reading: Reading) -> None:
    for worker in reading.workers:
        page.add("worker_threads", worker.threads, worker.device)
        page.add("worker_resident_bytes", worker.resident_bytes, worker.device)
        page.add("worker_refused_total", worker.num_refused, worker.device)
    present = {worker.device for worker in reading.workers}
    for device, sample in reading.history.latest_devices().items():
        if present and device not in present:
            continue
        page.add("device_held_bytes", sample.held_bytes, device)
        page.add("device_available_bytes", sample.available_bytes, device)
        page.add("device_cpu_ratio", sample.cpu_percent / 100, device)
        if sample.temperature_c is not None:
            page.add("device_temperature_celsius", sample.temperature_c, device)
        if sample.battery_percent is not None:
            page.add("device_battery_ratio", sample.battery_percent / 100, device)
        page.add("device_on_battery", sample.on_battery, device)

"""Counters and gauges of a pipeline in Prometheus' text exposition format.

Knows what is to be told; serving it is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lingualinked.telemetry.snapshot import Telemetry

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def prometheus_text(telemetry: Telemetry) -> str:
    """Write the totals since the pipeline was started, and its present state, for Prometheus to scrape.

    Parameters
    ----------
    telemetry : Telemetry
        The moment to tell of.

    Returns
    -------
    str
        Text format 0.0.4; to be served as ``text/plain; version=0.0.4``.

    References
    ----------
    https://prometheus.io/docs/instrumenting/exposition_formats and, for the names, https://prometheus.io/docs/practices/naming
    """
    page = _Page()
    _write_counters(page, telemetry)
    _write_stages(page, telemetry)
    _write_devices(page, telemetry)
    return page.text()


class _Page:
    """Families of samples, in the order in which they are first named."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(
        self,
        kind: Literal["counter", "gauge"],
        name: str,
        about: str,
        value: float,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Add one sample."""
        name = f"lingualinked_{name}"
        family = self._families.setdefault(name, [f"# HELP {name} {about}", f"# TYPE {name} {kind}"])
        marks = ",".join(f'{label}="{each.translate(_ESCAPES)}"' for label, each in (labels or {}).items())
        family.append(f"{name}{{{marks}}} {value!r}" if marks else f"{name} {value!r}")

    def text(self) -> str:
        """Return the page."""
        return "".join(f"{line}\n" for family in self._families.values() for line in family)


def _write_counters(page: _Page, telemetry: Telemetry) -> None:
    counters = telemetry.counters
    for kind, steps in (("decode", counters.decode), ("prefill", counters.prefill)):
        labels = {"kind": kind}
        page.add("counter", "steps_total", "Steps that came back.", steps.num_steps, labels)
        page.add("counter", "tokens_total", "Tokens that steps ran, over all rows.", steps.num_tokens, labels)
        page.add(
            "counter", "step_seconds_total", "Seconds from issue to answer, over all steps.", steps.total_s, labels
        )
    for device, totals in counters.devices.items():
        page.add("counter", "visits_total", "Stages that steps passed.", totals.num_visits, {"device": device})
        for part, seconds in (
            ("hop", totals.hop_s),
            ("wait", totals.wait_s),
            ("compute", totals.compute_s),
            ("codec", totals.codec_s),
        ):
            labels = {"device": device, "part": part}
            page.add(
                "counter", "stage_seconds_total", "Seconds that steps spent on a device, by part.", seconds, labels
            )
        about = "Bytes sent on by a device, before encryption."
        page.add("counter", "sent_bytes_total", about, totals.sent_bytes, {"device": device})
    for action, number in (("move", counters.num_moves), ("stay", counters.num_stays)):
        page.add("counter", "decisions_total", "Decisions of the balancer.", number, {"action": action})
    for outcome, number in (("succeeded", counters.num_migrations), ("failed", counters.num_failed_migrations)):
        page.add("counter", "migrations_total", "Migrations that ended.", number, {"outcome": outcome})
    page.add("counter", "moved_layers_total", "Layers moved between devices.", counters.num_moved_layers)
    about = "Seconds that the session held up longest waited for its switch, over all migrations."
    page.add("counter", "migration_stall_seconds_total", about, counters.stall_s)


def _write_stages(page: _Page, telemetry: Telemetry) -> None:
    for index, stage in enumerate(telemetry.stages):
        labels = {"stage": str(index), "device": stage.device}
        page.add("gauge", "stage_layers", "Layers of a stage.", stage.end - stage.start, labels)
        page.add("gauge", "stage_first_layer", "Number of its first layer.", stage.start, labels)
        page.add("gauge", "stage_weight_bytes", "Bytes of its weights.", stage.weight_bytes, labels)
        page.add("gauge", "stage_kv_bytes", "Bytes of its KV cache.", stage.kv_bytes, labels)
        page.add("gauge", "stage_sessions", "Sessions that hold KV there.", stage.num_sessions, labels)


def _write_devices(page: _Page, telemetry: Telemetry) -> None:
    for worker in telemetry.workers:
        labels = {"device": worker.device}
        page.add("gauge", "worker_threads", "Threads that a worker computes with.", worker.threads, labels)
        page.add("gauge", "worker_resident_bytes", "Resident memory of a worker.", worker.resident_bytes, labels)
        page.add(
            "counter",
            "worker_refused_total",
            "Messages and connections that a worker refused.",
            worker.num_refused,
            labels,
        )
    present = {worker.device for worker in telemetry.workers}
    for device, sample in telemetry.history.latest_devices().items():
        if present and device not in present:
            continue
        labels = {"device": device}
        page.add("gauge", "device_held_bytes", "Memory held for stages.", sample.held_bytes, labels)
        page.add("gauge", "device_available_bytes", "Memory still available.", sample.available_bytes, labels)
        page.add("gauge", "device_cpu_ratio", "Cores kept busy by a worker.", sample.cpu_percent / 100, labels)
        if sample.temperature_c is not None:
            page.add("gauge", "device_temperature_celsius", "Of the hottest sensor.", sample.temperature_c, labels)
        if sample.battery_percent is not None:
            page.add("gauge", "device_battery_ratio", "Charge of the battery.", sample.battery_percent / 100, labels)
        page.add("gauge", "device_on_battery", "1 if it runs from its battery.", int(sample.on_battery), labels)

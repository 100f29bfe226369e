"""Whether plans do what is predicted of them, and whether solving is worth it: imitated clusters, measured in one run.

Knows the public face; every plan of a cluster is loaded beside the others, and their runs alternate.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lingualinked as ll
from benchmarks.overhead import SHAPE, VOCABULARY
from benchmarks.samples import Samples, ratios
from lingualinked.cluster.devices import usable_cores
from lingualinked.display.console import new_console
from lingualinked.display.tables import Rows

_SPARE_CORES = 0.5
_NUM_STEPS = 12

CLUSTERS = {
    "two devices": (
        ll.Device(name="laptop", threads=1, slowdown=2.0, bandwidth="1Gbit/s", latency="1ms"),
        ll.Device(name="tablet", threads=1, slowdown=5.0, bandwidth="200Mbit/s", latency="3ms"),
    ),
    "three devices": (
        ll.Device(name="laptop", threads=1, slowdown=3.0, bandwidth="500Mbit/s", latency="2ms"),
        ll.Device(name="tablet", threads=1, slowdown=4.0, bandwidth="100Mbit/s", latency="3ms"),
        ll.Device(name="phone", threads=1, slowdown=8.0, bandwidth="50Mbit/s", latency="5ms"),
    ),
    "four devices": (
        ll.Device(name="desktop", threads=1, slowdown=2.0, bandwidth="1Gbit/s", latency="1ms"),
        ll.Device(name="laptop", threads=1, slowdown=4.0, bandwidth="500Mbit/s", latency="2ms"),
        ll.Device(name="tablet", threads=1, slowdown=6.0, bandwidth="100Mbit/s", latency="3ms"),
        ll.Device(name="phone", threads=1, slowdown=8.0, bandwidth="50Mbit/s", latency="5ms"),
    ),
}
"""Imitated heterogeneous clusters: slowdowns from 2 to 8, links from 50 to 1000 Mbit/s."""


@dataclasses.dataclass(slots=True)
class Measured:
    """What was measured of one plan: seconds of a decode step and of a first token, and tokens per second when full."""

    step_s: list[float] = dataclasses.field(default_factory=list)
    first_token_s: list[float] = dataclasses.field(default_factory=list)
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)


def run_predict(repeats: int, new_tokens: int, prompt_tokens: int) -> None:
    """Print, for each cluster, predicted, measured and simulated figures of the solved plan, and what solving brings."""
    torch.set_num_threads(1)
    console = new_console()
    for title, devices in CLUSTERS.items():
        load = sum((device.threads or 1) / device.slowdown for device in devices)
        if load > usable_cores() - _SPARE_CORES:
            console.print(f"{title}: skipped, {load:.2f} cores busy are more than {usable_cores()} less {_SPARE_CORES}")
            continue
        workload = ll.Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, num_sessions=2 * len(devices))
        rows, worth = _measure_cluster(devices, workload, repeats)
        cores = f"{load:.2f} of {usable_cores()} cores busy"
        console.print(Rows(f"{title.capitalize()}, {cores}, median of {repeats}", *rows).to_rich())
        console.print(Rows("Tokens/s with the pipeline full, of other plans", *worth).to_rich())


def _measure_cluster(devices: tuple[ll.Device, ...], workload: ll.Workload, repeats: int) -> Any:
    with tempfile.TemporaryDirectory() as folder, ll.Cluster(devices) as cluster:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        profile = ll.profile_model(folder, cluster, workload=workload, load_format="dummy", refresh=True)
        plans = {"solved": ll.solve(profile, workload=workload)}
        plans |= {kind: ll.baseline(profile, kind, workload=workload) for kind in ("even", "sum_objective")}
        models = {
            name: ll.ShardedModel.from_pretrained(
                folder, cluster=cluster, plan=plan, load_format="dummy", progress=False
            )
            for name, plan in plans.items()
        }
        measured = {name: Measured() for name in models}
        for model in models.values():  # what a shape costs the first time is not what is predicted
            model.generate(_prompt(workload, 0), max_new_tokens=2, do_sample=False)
        for _ in range(repeats):
            _measure_stream(models["solved"], workload, measured["solved"])
            for name, model in models.items():
                measured[name].tokens_per_s.append(_full_pipeline(model, workload))
        return _figures(plans["solved"], measured["solved"], workload), _worth(plans, measured)


def _measure_stream(model: Any, workload: ll.Workload, into: Measured) -> None:
    """Time one session alone: its first token, and decode steps around the mean context."""
    ids = _prompt(workload, 0)
    started = time.perf_counter()
    past = model(ids, logits_to_keep=1).past_key_values
    into.first_token_s.append(time.perf_counter() - started)
    steps = []
    for _ in range(_NUM_STEPS):
        started = time.perf_counter()
        model(ids[:, -1:], past_key_values=past)
        steps.append(time.perf_counter() - started)
    into.step_s.append(Samples(steps).median)


def _full_pipeline(model: Any, workload: ll.Workload) -> float:
    """Run all sessions of the workload at once, each its request; give tokens per second."""

    def request(index: int) -> None:
        model.generate(_prompt(workload, index), max_new_tokens=workload.new_tokens, do_sample=False)

    with concurrent.futures.ThreadPoolExecutor(workload.num_sessions) as pool:
        started = time.perf_counter()
        for future in [pool.submit(request, index) for index in range(workload.num_sessions)]:
            future.result()
        return workload.num_sessions * workload.new_tokens / (time.perf_counter() - started)


def _prompt(workload: ll.Workload, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, workload.prompt_tokens), generator=generator)


def _figures(plan: ll.Plan, measured: Measured, workload: ll.Workload) -> Any:
    predicted = plan.predicted
    simulated = ll.simulate(plan, workload, num_requests=workload.num_sessions)
    rows = []
    for what, values, expected, simulation, scale in (
        ("decode step, ms", measured.step_s, predicted.step_s, None, 1e3),
        ("first token, ms", measured.first_token_s, predicted.first_token_s, None, 1e3),
        ("full pipeline, tokens/s", measured.tokens_per_s, predicted.tokens_per_s, simulated.tokens_per_s, 1.0),
    ):
        found = Samples([scale * value for value in values])
        rows.append(
            (
                what,
                f"{scale * expected:.1f}",
                "" if simulation is None else f"{scale * simulation:.1f}",
                found.text(1),
                f"{100 * (scale * expected / found.median - 1):+.1f} %",
            )
        )
    return ("solved plan", "predicted", "simulated", "measured", "predicted off by"), rows


def _worth(plans: dict[str, ll.Plan], measured: dict[str, Measured]) -> Any:
    solved = Samples(measured["solved"].tokens_per_s)
    rows = []
    for name, plan in plans.items():
        found = Samples(measured[name].tokens_per_s)
        spans = ", ".join(f"{stage.device} {stage.num_layers}" for stage in plan.stages)
        rows.append((name, spans, f"{plan.predicted.tokens_per_s:.1f}", found.text(1), ratios(solved, found).text(2)))
    return ("plan", "layers", "predicted", "measured", "solved over it"), rows

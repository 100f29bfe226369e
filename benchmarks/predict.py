"""Whether plans do what is predicted of them, and whether solving is worth it: emulated clusters, measured in one run.

Knows the public face; every plan of a cluster is loaded beside the others, and their runs alternate.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import lingualinked as ll
from benchmarks.overhead import SHAPE
from lingualinked.cli.bench_command import Speed, draw_prompt, generate
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.processor import usable_cores
from lingualinked.tables import Rows

_SPARE_CORES = 0.5

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
"""Emulated heterogeneous clusters: slowdowns from 2 to 8, links from 50 to 1000 Mbit/s."""


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
        console.print(Rows(f"{title.capitalize()}, {cores}, median of {repeats}", *rows))
        console.print(Rows("Tokens/s with the pipeline full, of other plans", *worth))


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
        measured = {name: Speed() for name in models}
        for model in models.values():  # what a shape costs the first time is not what is predicted
            generate(model, draw_prompt(model, workload, 0), 2)
        for _ in range(repeats):
            measured["solved"].time_stream(models["solved"], workload)
            for name, model in models.items():
                measured[name].time_sessions(model, workload, workload.num_sessions)
        return _figures(plans["solved"], measured["solved"], workload), _worth(plans, measured)


def _figures(plan: ll.Plan, measured: Speed, workload: ll.Workload) -> Any:
    predicted = plan.predicted
    simulated = ll.simulate(plan, workload, num_requests=workload.num_sessions)
    rows = []
    for what, values, expected, simulation, scale in (
        ("decode step, ms", measured.step_s, predicted.step_s, None, 1e3),
        ("first token, ms", measured.first_token_s, predicted.first_token_s, None, 1e3),
        ("full pipeline, tokens/s", measured.tokens_per_s, predicted.tokens_per_s, simulated.tokens_per_s, 1.0),
    ):
        found = Repeats([scale * value for value in values])
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


def _worth(plans: dict[str, ll.Plan], measured: dict[str, Speed]) -> Any:
    solved = Repeats(measured["solved"].tokens_per_s)
    rows = []
    for name, plan in plans.items():
        found = Repeats(measured[name].tokens_per_s)
        spans = ", ".join(f"{stage.device} {stage.num_layers}" for stage in plan.stages)
        rows.append((name, spans, f"{plan.predicted.tokens_per_s:.1f}", found.text(1), ratios(solved, found).text(2)))
    return ("plan", "layers", "predicted", "measured", "solved over it"), rows

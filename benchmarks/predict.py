"""Whether plans do what is predicted of them, and whether solving is worth it: emulated clusters, measured in one run.

Knows the public face; every plan of a cluster is loaded beside the others, and their runs alternate.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lingualinked as ll
from lingualinked.cli.bench.models import draw_ids
from lingualinked.cli.bench.shapes import LLAMA_160M
from lingualinked.cli.bench.throughput import answers_tokens_per_s
from lingualinked.cli.bench.timing import generate
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.processor import usable_cores
from lingualinked.tables import Rows

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
"""Emulated heterogeneous clusters: slowdowns from 2 to 8, links from 50 to 1000 Mbit/s."""


@dataclasses.dataclass(slots=True)
class Speed:
    """The measured speed of a model, run by run."""

    first_token_s: list[float] = dataclasses.field(default_factory=list)  # of a single session
    step_s: list[float] = dataclasses.field(default_factory=list)  # the median decode step of a run
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)  # new ones, of all sessions together

    def time_stream(self, model: Any, workload: ll.Workload) -> None:
        """Time a single session: its first token, and the decode steps after it."""
        ids = draw_ids(model, 1, workload.prompt_tokens)
        with torch.inference_mode():
            began_s = time.perf_counter()
            past = model(ids, logits_to_keep=1).past_key_values
            self.first_token_s.append(time.perf_counter() - began_s)
            steps = []
            for _ in range(_NUM_STEPS):
                began_s = time.perf_counter()
                model(ids[:, -1:], past_key_values=past)
                steps.append(time.perf_counter() - began_s)
        self.step_s.append(Repeats(steps).median)

    def time_sessions(self, model: Any, workload: ll.Workload) -> None:
        """Time one answer per session, all at once."""
        prompts = [draw_ids(model, 1, workload.prompt_tokens, seed) for seed in range(workload.num_sessions)]
        self.tokens_per_s.append(answers_tokens_per_s(model, prompts, workload.new_tokens, len(prompts)))


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
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_160M))
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
            generate(model, draw_ids(model, 1, workload.prompt_tokens), 2)
        for _ in range(repeats):
            measured["solved"].time_stream(models["solved"], workload)
            for name, model in models.items():
                measured[name].time_sessions(model, workload)
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

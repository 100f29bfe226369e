"""A device that becomes slow under load: what rebalancing brings, how soon it acts, and for how long no token comes.

Knows the public face; with rebalancing, without, and with a fresh plan for the new speeds run by turns on one cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import lingualinked as ll
from lingualinked.cli.bench.models import uncut_dummy
from lingualinked.cli.bench.shapes import LLAMA_160M
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.display.decisions_view import record_line
from lingualinked.quantities import seconds_text
from lingualinked.tables import Rows

_SLOWDOWN, _FACTOR = 4.0, 4.0
_SLOW = "b"
_PROMPT_TOKENS = 16
_SETTLE_S = 30.0  # for which it runs before one device becomes slow
_MOVE_S = 40.0  # within which layers have to be moved
_WINDOW_S = 12.0  # of each measurement


def run_rebalance(num_sessions: int, new_tokens: int, repeats: int) -> None:
    """Print tokens per second before the change, and after it with and without rebalancing and with a fresh plan."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    console = new_console()
    devices = [ll.Device(name=name, threads=1, slowdown=_SLOWDOWN) for name in "abc"]
    workload = ll.Workload(prompt_tokens=_PROMPT_TOKENS, new_tokens=new_tokens, num_sessions=num_sessions)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_160M))
        uncut_dummy(folder).save_pretrained(folder)  # what is moved is read from files, as it would be
        slowed = [
            dataclasses.replace(device, slowdown=_SLOWDOWN * _FACTOR) if device.name == _SLOW else device
            for device in devices
        ]
        plan, fresh = (_plan(folder, each, workload) for each in (devices, slowed))
        cluster = stack.enter_context(ll.Cluster(devices))

        def load(**arguments: Any) -> Any:
            return ll.ShardedModel.from_pretrained(
                folder, cluster=cluster, progress=False, workload=workload, **arguments
            )

        moved = load(plan=plan, rebalance="auto")
        with _Stream(moved, workload):
            time.sleep(_SETTLE_S)
            before = moved.telemetry.tokens_per_s(_SETTLE_S / 2)
            slowed_s = time.monotonic()
            cluster.throttle(_SLOW, slowdown=_SLOWDOWN * _FACTOR)
            time.sleep(_MOVE_S)
        telemetry = moved.telemetry
        models = {
            "rebalanced": moved,
            "left alone": load(plan=plan),
            "fresh plan": load(plan=fresh),
        }
        seen: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(repeats):
            for name, model in models.items():
                with _Stream(model, workload):
                    time.sleep(_WINDOW_S)
                    seen[name].append(model.telemetry.tokens_per_s(_WINDOW_S * 2 / 3))
        spans = {name: _layers(model.plan) for name, model in models.items()}
    console.print(_speeds(before, seen, spans, plan))
    console.print(_move(telemetry, slowed_s))


def _plan(folder: str, devices: list[ll.Device], workload: ll.Workload) -> ll.Plan:
    with ll.Cluster(devices) as cluster:
        return ll.solve(ll.profile_model(folder, cluster, workload=workload, refresh=True), workload=workload)


class _Stream:
    """Requests in flight all the time, as many as the workload's sessions, until the block ends."""

    def __init__(self, model: Any, workload: ll.Workload) -> None:
        self._model, self._workload = model, workload
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(workload.num_sessions)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *error: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(3, LLAMA_160M["vocab_size"], (1, self._workload.prompt_tokens), generator=generator)
        while not self._enough.is_set():
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self._workload.new_tokens,
                do_sample=False,
                stopping_criteria=[lambda ids, scores: torch.tensor([self._enough.is_set()])],
            )


def _layers(plan: ll.Plan) -> str:
    return ", ".join(f"{stage.num_layers} {stage.device}" for stage in plan.stages)


def _speeds(before: float, seen: dict[str, list[float]], spans: dict[str, str], plan: ll.Plan) -> Rows:
    rows = [("before", f"{before:.1f}", "", _layers(plan))]
    rows += [
        (
            name,
            Repeats(values).text(1),
            ratios(Repeats(seen["rebalanced"]), Repeats(values)).text(),
            spans[name],
        )
        for name, values in seen.items()
    ]
    return Rows(
        f"Tokens/s after device {_SLOW!r} has become {_FACTOR:g} times slower",
        ("", "tokens/s", "rebalanced over it", "layers"),
        rows,
    )


def _move(telemetry: ll.Telemetry, slowed_s: float) -> Rows:
    """Tell what came of the change: after how many steps it was acted on, and how long no token came."""
    history = telemetry.history
    moves = [each for each in telemetry.decisions if each.action == "move" and each.time_s >= slowed_s]
    migrations = [each for each in telemetry.migrations if each.succeeded and each.time_s >= slowed_s]
    if not moves or not migrations:
        return Rows("The move", ("what", "seen"), [("layers moved", "never")])
    ends = sorted((step.time_s + step.total_s, step) for step in telemetry.steps if step.is_decode)
    all_ends = sorted(step.time_s + step.total_s for step in telemetry.steps)
    num_steps = sum(slowed_s <= end <= moves[0].time_s for end, _ in ends)
    normal_s = Repeats([step.total_s for end, step in ends if end < slowed_s]).median
    stalls, waits = [], []
    for migration in migrations:
        took_s = migration.total_s
        last_s = migration.time_s + took_s + normal_s
        tokens = [end for end in all_ends if migration.time_s - normal_s <= end <= last_s]
        gaps = [after - before for before, after in itertools.pairwise(tokens)]
        stalls.append(sum(max(0.0, gap - normal_s) for gap in gaps))
        waits.append(migration.longest_stall_s)
    return Rows(
        "The move",
        ("what", "seen"),
        [
            ("decode steps from the change to the first move", str(num_steps)),
            ("a normal step, before the change", seconds_text(normal_s)),
            ("no token beyond a normal step", f"{seconds_text(sum(stalls))}: {sum(stalls) / normal_s:.2f} steps"),
            ("longest that one session waited", f"{seconds_text(max(waits))}: {max(waits) / normal_s:.2f} steps"),
        ],
        notes=[
            *(record_line(each, history.start_s) for each in telemetry.decisions if each.time_s >= slowed_s),
            *(record_line(each, history.start_s) for each in migrations),
        ],
    )

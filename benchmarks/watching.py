"""``python -m benchmarks watching``: what watching a model for rebalancing adds to a single stream.

Knows the public face; alternates a model that is watched and one that is not, in one process.
"""

from __future__ import annotations

import functools
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import lingualinked as ll
from lingualinked.cli.bench.models import draw_ids
from lingualinked.cli.bench.shapes import LLAMA_160M
from lingualinked.cli.bench.timing import decode_tokens_per_s
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.tables import Rows

_WATCH_ONLY = ll.RebalancePolicy(margin=1e9)
_NEW_TOKENS = 256


def run_watching(context: int, repeats: int) -> None:
    """Print decode speed with a balancer that is told of every step, looks at the devices and moves nothing, and without."""
    torch.set_num_threads(1)
    plan = ll.Plan.from_spans([("worker-0", 0, 6), ("worker-1", 6, 12)])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_160M))
        with ll.Cluster([ll.Device(name=name, threads=1) for name in plan.devices]) as cluster:
            load = functools.partial(
                ll.ShardedModel.from_pretrained,
                folder,
                cluster=cluster,
                plan=plan,
                load_format="dummy",
                progress=False,
            )
            with load() as plain, load(rebalance=_WATCH_ONLY) as watched:
                new_console().print(_measure(plain, watched, context, repeats))


def _measure(plain: Any, watched: Any, context: int, repeats: int) -> Rows:
    ids = draw_ids(plain, 1, context)
    speeds: dict[str, list[float]] = {"plain": [], "watched": []}
    shares = []
    for model in (plain, watched):
        decode_tokens_per_s(model, ids, 8)
    for repeat in range(repeats):
        sides = [("plain", plain), ("watched", watched)]
        for name, model in sides if repeat % 2 else reversed(sides):
            used_s, began_s = _control_s(), time.perf_counter()
            speeds[name].append(decode_tokens_per_s(model, ids, _NEW_TOKENS))
            if model is watched:
                shares.append(100 * (_control_s() - used_s) / (time.perf_counter() - began_s))
    with_it, without = Repeats(speeds["watched"]), Repeats(speeds["plain"])
    return Rows(
        f"Decode watched for rebalancing against not, {_NEW_TOKENS} tokens, median of {repeats}",
        ("what", "measured"),
        [
            ("not watched, tokens/s", without.text()),
            ("watched, tokens/s", with_it.text()),
            ("ratio", ratios(with_it, without).text(3)),
            ("processor time of the thread that decides", Repeats(shares).text(2, " %")),
        ],
    )


def _control_s() -> float:
    """Seconds of processor time that threads which decide on rebalancing have used so far."""
    deciding = {thread.native_id for thread in threading.enumerate() if thread.name == "lingualinked-control"}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in deciding)

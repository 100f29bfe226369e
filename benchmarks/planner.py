"""``python -m benchmarks planner``: how long the planner takes, and how far from the best its plans can be.

Knows random problems in numbers; loads no model and starts no process.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

from lingualinked.cli.repeats import Repeats
from lingualinked.console import new_console
from lingualinked.planning.placement.solver import solve_problem
from lingualinked.quantities import count_text
from lingualinked.tables import Rows
from lingualinked.workload import Objective
from tests.random_problems import random_problem

SIZES: tuple[tuple[int, int, bool, Objective, float], ...] = (
    (32, 8, False, "throughput", 1),
    (32, 8, False, "throughput", 4),
    (32, 8, False, "throughput", math.inf),
    (80, 16, False, "throughput", 1),
    (80, 16, False, "throughput", 4),
    (80, 16, False, "throughput", 16),
    (80, 16, False, "throughput", math.inf),
    (128, 32, True, "throughput", math.inf),
    (128, 32, False, "throughput", math.inf),
    (32, 8, False, "latency", 1),
    (80, 16, False, "latency", 1),
    (80, 16, False, "energy", 1),
)
"""Layers, devices, whether the order is fixed, the objective, and sessions in flight; infinite: a full pipeline."""

NUM_INSTANCES = 100
"""Random problems of 80 layers and 16 devices whose gaps are listed."""


def run_planner(repeats: int) -> None:
    """Print seconds by size, and gaps between value and proven bound by number of kinds of layer."""
    console = new_console()
    console.print(_times(repeats))
    console.print(_gaps())


def _times(repeats: int) -> Rows:
    rows = []
    for num_layers, num_devices, fixed, objective, num_sessions in SIZES:
        seconds, gaps = [], []
        for seed in range(repeats):
            problem = random_problem(seed, num_layers=num_layers, num_devices=num_devices, num_kinds=1 + seed % 3)
            problem = dataclasses.replace(problem, num_sessions=num_sessions)
            started = time.perf_counter()
            solution = solve_problem(problem, objective, order=tuple(range(num_devices)) if fixed else None)
            seconds.append(time.perf_counter() - started)
            gaps.append(100 * (solution.value / solution.lower_bound - 1))
        of = "full pipeline" if math.isinf(num_sessions) else count_text(int(num_sessions), "session")
        what = f"{num_layers} x {num_devices}, {'fixed' if fixed else 'free'} order, {objective}, {of}"
        rows.append((what, Repeats(seconds).text(2, " s"), Repeats(gaps).text(2, " %")))
    return Rows(f"Time to solve, median of {repeats} (fastest to slowest)", ("layers x devices", "time", "gap"), rows)


def _gaps() -> Rows:
    gaps: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for seed in range(NUM_INSTANCES):
        num_kinds = 1 + seed % 3
        solution = solve_problem(random_problem(seed, num_kinds=num_kinds))
        gaps[num_kinds].append(100 * (solution.value / solution.lower_bound - 1))
    gaps[0] = list(itertools.chain(*gaps.values()))
    return Rows(
        f"Gap to the proven bound, {NUM_INSTANCES} problems of 80 x 16, free order, throughput",
        ("kinds of layer", "problems", "gap"),
        [
            (str(num_kinds or "all"), str(len(gaps[num_kinds])), Repeats(gaps[num_kinds]).text(2, " %"))
            for num_kinds in (1, 2, 3, 0)
        ],
    )

"""The placement problem with layers as loose items: a linear programme, and its integral sharpening.

Knows counts of layers of each kind on each device; not that a device's layers are contiguous, and no order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lingualinked.errors import LingualinkedError
from lingualinked.planning.placement.linear import INFEASIBLE, OPTIMAL, Matrix, minimise
from lingualinked.planning.placement.problem import Floats, Problem
from lingualinked.workload import Objective

MAX_SECONDS = 4.0
"""For the integral programme; what it has proven by then is a bound as well."""


def relaxation_value(
    problem: Problem,
    objective: Objective,
    devices: Sequence[int],
    max_bottleneck_s: float = math.inf,
    *,
    integral: bool = False,
) -> float:
    """Bound the objective from below by counting layers of equal cost and size, without their places.

    Variables, for device d and kind k (layers that are equal on all devices): ``0 <= x_dk <= n_k`` layers; shares
    ``0 <= u_d, f_d, l_d, t_d <= 1`` of being used, first, last, and both ends; and the bottleneck T in seconds.

    Constraints: ``sum_d x_dk = n_k``; ``sum_d f_d = sum_d l_d = 1``; ``x_dk <= n_k u_d``; ``f_d, l_d <= u_d``;
    ``t_d <= f_d, l_d``; a device's bytes within its memory, tied weights counted once by ``t_d``; its seconds
    ``s_d <= T``. The latency is at least the sum of ``s_d``, the ends' links and, for each device used besides the
    first, its quickest link inwards. Minimised are T, the latency being at most T times the sessions in flight; or the
    latency; or the sum of ``watts_d s_d``. Every placement satisfies all of it.

    Parameters
    ----------
    problem : Problem
        The problem.
    objective : {"throughput", "latency", "energy"}
        What is minimised.
    devices : sequence of int
        Those that may be used.
    max_bottleneck_s : float
        The most seconds that a device may need.
    integral : bool
        Whether counts and shares are integers; the value is then the dual bound of branch and bound.

    Returns
    -------
    float
        In seconds or joules; ``inf`` if even this is infeasible.

    Raises
    ------
    LingualinkedError
        If linprog stops on the linear programme with a status other than optimal (0) or infeasible (2).
    """
    model = _Model.of(problem, np.array(devices, dtype=int), max_bottleneck_s)
    cost, scale = model.objective(problem, objective)
    answer = minimise(
        cost / scale,
        equal=model.equal,
        at_most=model.upper,
        highest=model.highest,
        integral=model.integrality if integral else None,
        max_s=MAX_SECONDS,
    )
    if answer.status == INFEASIBLE:
        return math.inf
    if answer.status != OPTIMAL and not integral:
        raise LingualinkedError(f"linprog stopped with status {answer.status} on the relaxation: {answer.message}")
    return max(0.0, answer.bound) * scale


@dataclasses.dataclass(slots=True, eq=False)
class _Model:
    """Columns: x (n times K), then u, f, l, t (n each), then T. Seconds and bytes are scaled to about 1."""

    devices: NDArray[np.int64]
    counts: Floats
    seconds: Matrix
    highest: Floats
    integrality: Floats
    time_scale: float
    upper: list[tuple[Matrix, Floats]] = dataclasses.field(default_factory=list)
    equal: list[tuple[Matrix, Floats]] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.highest)

    @classmethod
    def of(cls, problem: Problem, devices: NDArray[np.int64], max_s: float) -> _Model:
        columns = np.vstack([problem.layer_s[devices], problem.layer_bytes[None]])
        kinds, counts = np.unique(columns, axis=1, return_counts=True)
        kind_s, kind_bytes = kinds[:-1], kinds[-1]
        n, num_kinds = len(devices), len(counts)
        eye: Matrix
        eye, none = sparse.identity(n, format="csr"), sparse.csr_matrix((n, n))
        time_scale = float(problem.layer_s[devices].sum(axis=1).max()) or 1.0
        blank = sparse.csr_matrix((n, 1))

        first_ok = problem.may_be_first & np.isfinite(problem.enter_s)
        last_ok = problem.may_be_last & np.isfinite(problem.leave_s)
        shares = np.concatenate([np.ones(n), first_ok[devices], last_ok[devices], first_ok[devices] & last_ok[devices]])
        highest = np.concatenate([np.tile(counts, n), shares, [max_s / time_scale]]).astype(float)

        layers_s: Matrix = sparse.block_diag([row[None] for row in kind_s / time_scale])
        extras_s: list[Matrix] = [
            sparse.diags(v[devices] / time_scale) for v in (problem.stage_s, problem.first_s, problem.last_s)
        ]
        seconds = sparse.hstack([layers_s, *extras_s, none, blank]).tocsr()
        model = cls(devices, counts.astype(float), seconds, highest, np.r_[np.ones(len(highest) - 1), 0.0], time_scale)

        def shares_row(u: float, f: float, last: float, t: float) -> Matrix:
            loose = sparse.csr_matrix((n, n * num_kinds))
            return sparse.hstack([loose, u * eye, f * eye, last * eye, t * eye, blank]).tocsr()

        model._at_most(seconds - sparse.csr_matrix(np.eye(len(highest))[-1:].repeat(n, axis=0)), np.zeros(n))
        model._at_most(shares_row(-1, 1, 0, 0), np.zeros(n))
        model._at_most(shares_row(-1, 0, 1, 0), np.zeros(n))
        model._at_most(shares_row(0, -1, 0, 1), np.zeros(n))
        model._at_most(shares_row(0, 0, -1, 1), np.zeros(n))
        used = sparse.kron(eye, -counts[:, None].astype(float))
        model._at_most(
            sparse.hstack([sparse.identity(n * num_kinds), used, sparse.csr_matrix((n * num_kinds, 3 * n + 1))]),
            np.zeros(n * num_kinds),
        )
        limited = np.isfinite(problem.capacity_bytes[devices])
        limits = problem.capacity_bytes[devices][limited]
        unit = np.maximum(limits, 1.0)
        held = sparse.hstack(
            [
                sparse.kron(eye, kind_bytes[None]),
                sparse.diags(problem.stage_bytes[devices]),
                problem.first_bytes * eye,
                problem.last_bytes * eye,
                -problem.tied_bytes * eye,
                blank,
            ]
        ).tocsr()[limited]
        model._at_most(sparse.diags(1 / unit) @ held, limits / unit)
        model._exactly(
            sparse.hstack(
                [sparse.kron(np.ones((1, n)), sparse.identity(num_kinds)), sparse.csr_matrix((num_kinds, 4 * n + 1))]
            ),
            counts.astype(float),
        )
        ends = sparse.csr_matrix(np.kron(np.eye(4)[1:3], np.ones((1, n))))
        model._exactly(
            sparse.hstack([sparse.csr_matrix((2, n * num_kinds)), ends, sparse.csr_matrix((2, 1))]), np.ones(2)
        )
        return model

    def objective(self, problem: Problem, objective: Objective) -> tuple[Floats, float]:
        """Give the costs and their unit."""
        n = len(self.devices)
        at_shares = self.size - 4 * n - 1
        used, first, last = (slice(at_shares + k * n, at_shares + (k + 1) * n) for k in range(3))
        weight = problem.watts[self.devices] if objective == "energy" else np.ones(n)
        cost = np.asarray(self.seconds.T @ weight) * self.time_scale
        if objective == "energy":
            return cost, float(weight.max() * self.time_scale) or 1.0
        hops = problem.hop_s[np.ix_(self.devices, self.devices)].copy()
        np.fill_diagonal(hops, np.inf)
        inward = hops.min(axis=0)
        inward[~np.isfinite(inward)] = 0.0
        cost[used] += inward
        cost[first] += np.where(self.highest[first] > 0, problem.enter_s[self.devices], 0.0) - inward
        cost[last] += np.where(self.highest[last] > 0, problem.leave_s[self.devices], 0.0)
        if objective == "latency":
            return cost, self.time_scale
        self._within_bottleneck(cost / problem.num_sessions)
        for share, busy_s in ((first, problem.enter_busy_s), (last, problem.leave_busy_s)):
            row = np.zeros(self.size)
            row[share] = np.where(self.highest[share] > 0, busy_s[self.devices], 0.0)
            self._within_bottleneck(row)
        cost = np.zeros(self.size)
        cost[-1] = self.time_scale
        return cost, self.time_scale

    def _within_bottleneck(self, seconds: Floats) -> None:
        """Add that some seconds, linear in the columns, are at most T."""
        row = seconds / self.time_scale
        row[-1] -= 1.0
        self._at_most(sparse.csr_matrix(row[None]), np.zeros(1))

    def _at_most(self, rows: Matrix, limits: Floats) -> None:
        self.upper.append((rows, limits))

    def _exactly(self, rows: Matrix, values: Floats) -> None:
        self.equal.append((rows, values))

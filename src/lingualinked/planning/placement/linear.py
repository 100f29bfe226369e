"""The one call of `scipy.optimize.linprog`, with its answer in types of our own.

Knows matrices and vectors; not what they stand for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from scipy import optimize, sparse

from lingualinked.planning.placement.problem import Floats

Matrix: TypeAlias = Any
"""A scipy.sparse matrix or a dense array: the stubs give each format a type of its own."""

OPTIMAL, STOPPED, INFEASIBLE = 0, 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What linprog found.

    Parameters
    ----------
    status : int
        0 optimal, 1 stopped at a limit, 2 infeasible, 3 unbounded, 4 numerical difficulties.
    message : str
        In the solver's words.
    x : ndarray
        float64, the solution; empty if there is none.
    bound : float
        No feasible point costs less: the optimum, or what branch and bound had proven when it stopped; ``-inf`` if
        nothing is known.
    prices : ndarray
        float64, dual values of the equations, then of the inequalities; empty where there are none.
    """

    status: int
    message: str
    x: Floats
    bound: float
    prices: Floats


def minimise(
    cost: Floats,
    *,
    equal: Sequence[tuple[Matrix, Floats]] = (),
    at_most: Sequence[tuple[Matrix, Floats]] = (),
    highest: Floats | float = math.inf,
    integral: Floats | None = None,
    max_s: float | None = None,
    tolerance: float = 1e-7,
) -> Answer:
    """Minimise a linear cost over ``0 <= x <= highest`` by HiGHS: the dual simplex method, or branch and bound.

    Parameters
    ----------
    cost : ndarray
        float64 ``[N]``.
    equal, at_most : sequence of (matrix, ndarray)
        Blocks of rows ``A x = b`` and ``A x <= b``.
    highest : ndarray or float
        Upper bounds.
    integral : ndarray, optional
        1 for variables that are integers, 0 for others. None: all are real, and the solution is a vertex.
    max_s : float, optional
        Seconds after which branch and bound stops.
    tolerance : float
        Of primal and dual feasibility.

    Returns
    -------
    Answer
        For the caller to judge by its status.
    """
    options: dict[str, Any] = {"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance}
    if integral is not None:
        options = {"mip_rel_gap": 1e-4, "time_limit": max_s}
    call: Any = optimize.linprog  # looked up on each call, so that a test can take its place
    result = call(
        cost,
        A_ub=sparse.vstack([rows for rows, _ in at_most], format="csr") if at_most else None,
        b_ub=np.concatenate([limits for _, limits in at_most]) if at_most else None,
        A_eq=sparse.vstack([rows for rows, _ in equal], format="csr") if equal else None,
        b_eq=np.concatenate([values for _, values in equal]) if equal else None,
        bounds=np.stack([np.zeros(len(cost)), np.broadcast_to(highest, cost.shape)], axis=1),
        method="highs-ds" if integral is None else "highs",
        integrality=integral,
        options=options,
    )
    bound = result.fun if integral is None and result.status == OPTIMAL else result.get("mip_dual_bound")
    marginals = (
        [] if integral is not None or result.status != OPTIMAL else [result.eqlin.marginals, result.ineqlin.marginals]
    )
    return Answer(
        status=int(result.status),
        message=str(result.message),
        x=np.empty(0) if result.x is None else np.asarray(result.x, dtype=float),
        bound=-math.inf if bound is None or math.isnan(bound) else float(bound),
        prices=np.concatenate(marginals) if marginals else np.empty(0),
    )

"""Random placement problems shaped like large language models on mixed machines.

Knows numbers only; the planner's tests and its benchmark draw the same ones.
"""

from __future__ import annotations

import numpy as np

from lingualinked.planning.placement.problem import Problem


def random_problem(
    seed: int, *, num_layers: int = 80, num_devices: int = 16, num_kinds: int = 1, rings: bool = False
) -> Problem:
    """Draw a model of repeating layers with heavier ends, and devices of speeds 1 to 6 with memory and links of their own.

    Parameters
    ----------
    seed : int
        The same seed gives the same problem.
    num_layers, num_devices : int
        Its size.
    num_kinds : int
        Length of the pattern in which layers repeat.
    rings : bool
        Whether every device may hold the first and the last stage both.

    Returns
    -------
    Problem
        Feasible: the memories hold the model one and a half times to three times.
    """
    rng = np.random.default_rng(seed)
    kinds = np.arange(num_layers) % num_kinds
    kind_s = rng.uniform(0.5e-3, 3e-3, num_kinds)
    kind_bytes = rng.uniform(2e8, 9e8, num_kinds).round()
    speed = rng.uniform(1, 6, num_devices)
    # devices differ in how well they take to each kind, as they do to attention, recurrence and experts
    layer_s = (kind_s[None] * rng.uniform(0.8, 1.25, (num_devices, num_kinds)))[:, kinds] / speed[:, None]
    layer_bytes = kind_bytes[kinds]
    first_bytes, last_bytes = rng.uniform(3e8, 2e9, 2).round()
    shares = rng.uniform(0.4, 1.6, num_devices)
    capacity = shares / shares.sum() * (layer_bytes.sum() + first_bytes + last_bytes) * rng.uniform(1.5, 3)
    capacity = np.maximum(capacity, 2 * layer_bytes.max() + first_bytes + last_bytes).round()
    latency_s = rng.uniform(1e-4, 3e-3, (num_devices, num_devices))
    busy_s = rng.uniform(1e-5, 2e-3, (num_devices, num_devices))
    ends_s = rng.uniform(1e-5, 2e-3, (2, num_devices))
    anywhere = np.ones(num_devices, dtype=bool)
    return Problem(
        names=tuple(f"d{index}" for index in range(num_devices)),
        layer_s=layer_s,
        stage_s=rng.uniform(0, 2e-4, num_devices),
        first_s=rng.uniform(0, 5e-4, num_devices) / speed,
        last_s=rng.uniform(1e-3, 6e-3, num_devices) / speed,
        hop_s=latency_s + busy_s,
        busy_s=busy_s,
        enter_s=ends_s[0],
        enter_busy_s=ends_s[0] / 10,
        leave_s=ends_s[1],
        leave_busy_s=ends_s[1] / 10,
        layer_bytes=layer_bytes,
        stage_bytes=np.full(num_devices, 5e7),
        first_bytes=float(first_bytes),
        last_bytes=float(last_bytes),
        tied_bytes=0.0,
        capacity_bytes=capacity,
        may_be_first=anywhere,
        may_be_last=anywhere,
        may_close=anywhere if rings else ~anywhere,
        watts=rng.uniform(5, 50, num_devices) * speed,
    )

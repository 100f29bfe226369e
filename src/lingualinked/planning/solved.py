"""What the solver says of a plan that it made: its value, and how near that is to the best.

Knows numbers only.
"""

from __future__ import annotations

import dataclasses

from lingualinked.workload import Objective


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What the solver says of a plan.

    Parameters
    ----------
    objective : {"throughput", "latency", "energy"}
        What was minimised, of a mean step: the interval between steps with the workload's sessions in flight, the sum
        over stages and hops, or the energy.
    value : float
        Of the objective: seconds, or joules for energy.
    lower_bound : float
        No placement has a smaller value; proven.
    unused : tuple of str
        Devices that the plan does without.
    min_tokens_per_s : float or None
        Floor that was set for ``"energy"``.
    num_sessions : int or None
        Sessions in flight that ``"throughput"`` was solved for; ``None``: those of the plan's workload.
    """

    objective: Objective
    value: float
    lower_bound: float
    unused: tuple[str, ...] = ()
    min_tokens_per_s: float | None = None
    num_sessions: int | None = None

    @property
    def gap(self) -> float:
        """How far the value may be from the optimum, at most, as a share of the proven bound."""
        return self.value / self.lower_bound - 1 if self.lower_bound > 0 else 0.0

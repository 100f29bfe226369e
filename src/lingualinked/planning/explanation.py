"""What limits a plan, what would help most, and whether another device would, as text and figures.

Plain results; knows neither plans nor how they are explained.
"""

from __future__ import annotations

import dataclasses

from lingualinked.shown import Printed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A change, and what the best plan would do then.

    Parameters
    ----------
    change : str
        What is changed.
    gain : float
        Value of the plan's objective divided by that of the best plan after the change: above 1, it helps.
    tokens_per_s : float
        Predicted after the change: of one session for ``"latency"``, else of all that the workload has in flight.
    """

    change: str
    gain: float
    tokens_per_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explanation(Printed):
    """Why a plan is as fast as it is; shows itself as text.

    Parameters
    ----------
    limit : str
        What limits it.
    another_device : WhatIf
        What a copy of its most useful device would bring.
    what_ifs : tuple of WhatIf
        Other changes, the most helpful first.
    objective : str
        What the gains are of.
    tokens_per_s : float
        Predicted now, as in `WhatIf`.
    fewer_devices : str
        When fewer devices would be faster, in one sentence; empty if they would not be.
    """

    limit: str
    another_device: WhatIf
    what_ifs: tuple[WhatIf, ...]
    objective: str
    tokens_per_s: float
    fewer_devices: str = ""

    def __str__(self) -> str:
        lines = [self.limit, f"Predicted: {self.tokens_per_s:.1f} tokens/s."]
        if self.fewer_devices:
            lines.append(self.fewer_devices)
        another = self.another_device
        if another.gain > 1.01:
            lines.append(
                f"Another device will help: {another.change} gives {another.tokens_per_s:.1f} tokens/s "
                f"({another.gain:.2f} times as good)."
            )
        else:
            lines.append(f"Another device will not help: {another.change} gives {another.tokens_per_s:.1f} tokens/s.")
        helpful = [each for each in self.what_ifs if each.gain > 1.01]
        if helpful:
            lines.append("What would help most:")
            lines += [f"  {each.change}: {each.tokens_per_s:.1f} tokens/s ({each.gain:.2f} x)" for each in helpful[:4]]
        else:
            lines.append("None of twice the speed, memory or bandwidth of one device would help.")
        return "\n".join(lines)

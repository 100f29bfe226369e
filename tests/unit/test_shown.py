"""What IPython shows of an object is what print shows of it."""

from __future__ import annotations

from typing import Any

import pytest
from IPython.lib.pretty import pretty

import lingualinked as ll
from histories import decision, migration, recorded
from profiles import profile

PLAN = ll.solve(profile(ll.Device(name="a", memory="60MiB"), ll.Device(name="b", memory="60MiB")))
SHOWN = {
    "plan": PLAN,
    "profile": PLAN.measured,
    "prediction": PLAN.predicted,
    "explanation": PLAN.explain(),
    "comparison": PLAN.compare(PLAN),
    "simulation": ll.simulate(PLAN, num_requests=2),
    "telemetry": ll.Telemetry(stages=(), workers=(), history=recorded(20)),
    "decision": decision(),
    "migration": migration(),
}


@pytest.mark.parametrize("name", SHOWN)
def test_alone_and_in_a_list(name: str) -> None:
    shown: Any = SHOWN[name]
    lines = str(shown).splitlines()
    assert lines
    assert pretty(shown).splitlines() == lines
    within = [line.strip() for line in pretty([shown, 1]).removeprefix("[").splitlines()]
    assert within[: len(lines) - 1] == [line.strip() for line in lines[:-1]]
    assert within[len(lines) - 1].startswith(f"{lines[-1].strip()},")

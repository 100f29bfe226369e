"""Whether a model fits is known from its bytes, and said in the solver's words."""

from __future__ import annotations

import dataclasses
import random

import pytest

import lingualinked as ll
from lingualinked.planning import fitting
from lingualinked.planning.fitting import check_fits
from profiles import MIB, model_profile, profile

WORKLOAD = ll.Workload(prompt_tokens=64, new_tokens=64)


def fits(devices: list[ll.Device], reserve: float = 0.05, num_layers: int = 4, **free_bytes: int) -> bool:
    try:
        check_fits(model_profile(num_layers), devices, {}, WORKLOAD, free_bytes=free_bytes, reserve=reserve)
    except ll.InfeasiblePlanError:
        return False
    return True


def test_the_refusal_is_the_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [ll.Device(name=name, memory=15 * MIB) for name in "ab"]
    made = dataclasses.replace(profile(*devices, num_layers=4), model=model_profile(4))
    with pytest.raises(ll.InfeasiblePlanError) as solved:
        ll.solve(made, workload=WORKLOAD)
    with pytest.raises(ll.InfeasiblePlanError) as asked:
        check_fits(made.model, devices, {}, WORKLOAD, free_bytes={}, reserve=0.05)
    assert str(asked.value) == str(solved.value)
    assert "what would fit: one more device of at least" in str(asked.value)


def test_as_often_as_the_solver_finds_a_plan() -> None:
    """Tight and ample memory, limits and what is free, trusted devices: the answer is the solver's."""
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        devices = [
            ll.Device(
                name=name, memory=rng.choice([None, *range(8 * MIB, 60 * MIB, 4 * MIB)]), trusted=rng.random() < 0.2
            )
            for name in "abc"[: rng.randint(1, 3)]
        ]
        free = {device.name: rng.randrange(10 * MIB, 80 * MIB) for device in devices}
        made = profile(*devices, num_layers=4)
        made = dataclasses.replace(
            made, devices=tuple(dataclasses.replace(each, free_bytes=free[each.device.name]) for each in made.devices)
        )
        try:
            ll.solve(made, workload=WORKLOAD)
            solved = True
        except ll.InfeasiblePlanError:
            solved = False
        assert fits(devices, **free) == solved
        seen.add(solved)
    assert seen == {True, False}


def test_where_memory_is_ample_nothing_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("solved")

    monkeypatch.setattr(fitting, "solve", refuse)
    assert fits([ll.Device(name="a"), ll.Device(name="b", memory=MIB)])
    assert fits([ll.Device(name="a", memory="1GiB", trusted=True)])
    assert fits([ll.Device(name="a"), ll.Device(name="b", trusted=True)])

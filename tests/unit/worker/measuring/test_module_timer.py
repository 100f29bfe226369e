"""Modules are timed by a pair of moments each; nothing waits for the device before the times are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lingualinked.worker.measuring.module_timer import GpuClock, HostClock, ModuleTimer, clock_of
from lingualinked.worker.steps.pace import Pace


class Moments:
    """A device's clock, which goes on by a second with each mark; it notes when it is waited for."""

    def __init__(self) -> None:
        self.now, self.num_waits = 0, 0

    def mark(self) -> int:
        self.now += 1
        return self.now

    def seconds_between(self, first: int, last: int) -> float:
        self.num_waits += 1
        return float(last - first)


class Two(nn.Module):
    """An embedding, two layers, of which the second has a module that is timed too, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Identity(), nn.Identity()
        self.layers = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Identity(), self.norm)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.embed(states)
        for layer in self.layers:
            states = layer(states)
        return states


def test_times_are_those_between_the_marks_of_each_module() -> None:
    parts = SimpleNamespace(layers="layers", prologue=("embed",), epilogue=("norm",))
    span: Any = SimpleNamespace(model=Two(), parts=parts)
    clock = Moments()
    with ModuleTimer(span, 0, 2, clock) as timer:
        for _ in range(2):
            timer.clear()
            span.model(torch.zeros(1))
            assert clock.num_waits == 0
        assert (timer.prologue_s, timer.layers_s, timer.epilogue_s) == (1.0, [1.0, 3.0], 1.0)
    span.model(torch.zeros(1))
    assert timer.layers_s == [1.0, 3.0]  # hooks are gone


def test_each_device_has_its_clock() -> None:
    pace = Pace(1, 1.0)
    assert isinstance(clock_of(torch.device("cpu"), pace), HostClock)
    assert isinstance(clock_of(torch.device("cuda:0"), pace), GpuClock)

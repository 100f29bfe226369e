"""Times the modules of a span during a step: on a CPU by the clock, on a GPU by events that are read after the step.

Knows hooks and clocks; not which steps are run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from lingualinked.model.weights.span_loading import LoadedSpan
    from lingualinked.worker.steps.pace import Pace

_Moment = TypeVar("_Moment")


class Clock(Protocol[_Moment]):
    """Marks moments of a computation; how far they are apart is asked once it is over."""

    def mark(self) -> _Moment:
        """Mark the present moment, without waiting for anything."""

    def seconds_between(self, first: _Moment, last: _Moment) -> float:
        """Return the seconds from one moment to another; waits until the device has reached both."""


class HostClock:
    """Marks moments of what this thread computes, on the device that it emulates."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def mark(self) -> float:
        """Return the time now."""
        return self._pace.emulated_clock_s()

    def seconds_between(self, first: float, last: float) -> float:
        """Return their difference."""
        return last - first


class GpuClock:
    """Marks moments in the stream of a GPU, which goes on: a clock of the host would make each module wait for the one before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds_between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Wait for the later event, and return the time that the GPU has measured."""
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


def clock_of(device: torch.device, pace: Pace) -> Clock[Any]:
    """Return the clock of what is computed on a device."""
    return GpuClock(device) if device.type == "cuda" else HostClock(pace)


class ModuleTimer(Generic[_Moment]):
    """Times a span's layers, its prologue and its epilogue, by hooks on their modules; results are read after the step."""

    def __init__(self, span: LoadedSpan, start: int, end: int, clock: Clock[_Moment]) -> None:
        self._clock = clock
        self._hooks = contextlib.ExitStack()
        self._layers: list[tuple[_Moment, _Moment]] = []
        self._prologue: list[tuple[_Moment, _Moment]] = []
        self._epilogue: list[tuple[_Moment, _Moment]] = []
        layers = span.model.get_submodule(span.parts.layers)
        assert isinstance(layers, nn.ModuleList)
        for layer in layers[start:end]:
            self._time_module(layer, self._layers.append)
        for path in span.parts.prologue:
            self._time_module(span.model.get_submodule(path), self._prologue.append)
        for path in span.parts.epilogue:
            self._time_module(span.model.get_submodule(path), self._epilogue.append)

    @property
    def layers_s(self) -> list[float]:
        """Seconds of each layer since `clear`."""
        return [self._clock.seconds_between(*moments) for moments in self._layers]

    @property
    def prologue_s(self) -> float:
        """Seconds of all modules of the prologue since `clear`."""
        return sum(self._clock.seconds_between(*moments) for moments in self._prologue)

    @property
    def epilogue_s(self) -> float:
        """Seconds of all modules of the epilogue since `clear`."""
        return sum(self._clock.seconds_between(*moments) for moments in self._epilogue)

    def clear(self) -> None:
        """Forget what was timed."""
        for moments in (self._layers, self._prologue, self._epilogue):
            moments.clear()

    def _time_module(self, module: nn.Module, record: Callable[[tuple[_Moment, _Moment]], None]) -> None:
        began: list[_Moment] = []

        def begin(_module: nn.Module, _arguments: Any) -> None:
            began.append(self._clock.mark())

        def finish(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            record((began.pop(), self._clock.mark()))

        self._hooks.callback(module.register_forward_pre_hook(begin).remove)
        self._hooks.callback(module.register_forward_hook(finish).remove)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

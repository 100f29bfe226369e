"""Captures and interventions at the modules of a stage: torch's hooks that last for one forward pass.

Knows modules and arithmetic; neither messages nor who asked.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.cutting.cut import StandIn
from lingualinked.model.hooks.hook_cuts import first_tensor, with_first_input, with_first_tensor
from lingualinked.model.hooks.hook_points import contains_layers
from lingualinked.model.hooks.instrument_data import (
    Capture,
    Change,
    Choice,
    Instrument,
    Instruments,
    Side,
    positions_in,
    rows_in,
)
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lingualinked.model.cutting.model_parts import ModelParts

Index = tuple[Any, ...] | None
"""What rows and positions are as an index of a tensor; None: all of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Item:
    """An instrument with its number, its tensors, and the number of its rows and positions among those that differ."""

    number: int
    given: Instrument
    tensors: tuple[Tensor, ...]
    choice: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """One side of a module with what is done there, in order."""

    module: nn.Module
    path: str
    side: Side
    items: list[_Item]


class StageInstruments:
    """The captures and interventions of a session at the modules of one stage.

    Raises ProtocolError if they name modules that the model does not have, or don't fit their tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: ModelParts,
        given: Instruments,
        tensors: tuple[Tensor, ...],
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        self.places: list[_Place] = []
        self.choices: list[tuple[Choice, Choice]] = []  # rows and positions, as they differ
        found: dict[tuple[str, Side], _Place | None] = {}
        for number, item in enumerate(given.items):
            key = item.path, item.side
            if key not in found:
                module = _find_module(model, item.path)
                is_elsewhere = contains_layers(item.path, parts.layers) and not (
                    is_first if item.side == "input" else is_last
                )
                if module is None or is_elsewhere or (parts.is_in_every_stage(item.path) and not is_first):
                    found[key] = None
                else:
                    place = found[key] = _Place(module, item.path, item.side, [])
                    self.places.append(place)
            own = _own_tensors(item, tensors)
            place_here = found[key]
            if place_here is not None:
                choice = item.rows, item.positions
                if choice not in self.choices:
                    self.choices.append(choice)
                place_here.items.append(_Item(number, item, own, self.choices.index(choice)))


def _find_module(model: nn.Module, path: str) -> nn.Module | None:
    """Return a module by its path, or None if another stage has it; raise ProtocolError if the model does not."""
    module = model
    for name in path.split("."):
        held = module._modules.get(name)  # noqa: SLF001 - attributes that are no modules don't count
        if held is None:
            raise ProtocolError(f"the model has no module {path!r}")
        if isinstance(held, StandIn):
            return None
        module = held
    return module


def _own_tensors(item: Instrument, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors of an intervention; raise ProtocolError if it lacks some."""
    if isinstance(item, Capture):
        return ()
    if any(index >= len(tensors) for index in item.tensors):
        raise ProtocolError(f"an intervention at {item.path} names tensors that are not among {len(tensors)}")
    expected = {"add": (1, 0), "replace": (1, 0), "remove": (1, 0), "keep": (1, 0)}
    num_tensors, num_numbers = len(item.tensors), len(item.numbers)
    if item.kind == "scale":
        fits = num_tensors + num_numbers == 1 and None not in item.numbers
    elif item.kind == "clamp":
        fits = num_tensors < 2 and num_numbers == 2 and item.numbers != (None, None)
    else:
        fits = (num_tensors, num_numbers) == expected[item.kind]
    if not fits:
        raise ProtocolError(
            f"an intervention of the kind {item.kind!r} at {item.path} came with "
            f"{count_text(num_tensors, 'tensor')} and {count_text(num_numbers, 'number')}"
        )
    return tuple(tensors[index] for index in item.tensors)


class InstrumentedPass:
    """One forward pass in this thread with a session's instruments, of `num_new` tokens behind `past` others.

    Its hooks run behind those of `HookedPass`, whatever the order in which modules get them, so that they see what a user's
    hooks have made of a value; and before what records outputs, or sends them on.
    """

    def __init__(
        self, instruments: StageInstruments, num_rows: int, num_new: int, past: int, *, captures: bool
    ) -> None:
        self.captured: list[tuple[int, Tensor]] = []  # by the number of the instrument, in the order of the calls
        self._num_rows, self._past, self._num_new = num_rows, past, num_new
        self._thread = threading.get_ident()
        self._choices = instruments.choices
        self._indices: dict[int, Index] = {}
        self._handles = []
        for place in instruments.places:
            items = [
                each
                for each in place.items
                if each.given.runs_in(past) and (captures or not isinstance(each.given, Capture))
            ]
            if items and place.side == "output":
                self._handles.append(place.module.register_forward_hook(self._make_after(place, items), prepend=True))
            elif items:
                before = self._make_before(place, items)
                self._handles.append(place.module.register_forward_pre_hook(before, with_kwargs=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _make_after(self, place: _Place, items: Sequence[Any]) -> Any:
        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            if threading.get_ident() != self._thread:
                return None
            states = first_tensor(f"the output of {place.path}", output)
            changed = self._run(place, items, states)
            return None if changed is states else with_first_tensor(output, changed)

        return after

    def _make_before(self, place: _Place, items: Sequence[Any]) -> Any:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if kwargs is None or threading.get_ident() != self._thread:
                return None
            states = first_tensor(f"the input of {place.path}", (*args, *kwargs.values()))
            changed = self._run(place, items, states)
            return None if changed is states else with_first_input(args, kwargs, changed)

        return before

    def _run(self, place: _Place, items: Sequence[Any], states: Tensor) -> Tensor:
        """Do what is to be done at one side of a module, in order; return what its value is then."""
        for item in items:
            given, index = item.given, self._find_index(item, states.device)
            if not given.takes_everything or (isinstance(given, Capture) and given.reduction is not None):
                self._check_shape(place, states)
            if index == ():
                continue
            # Contiguous, since how they lie decides how products and sums are computed.
            chosen = states if given.takes_everything else states[slice(None) if index is None else index].contiguous()
            if isinstance(given, Capture):
                self.captured.append((item.number, _captured(given, chosen)))
                continue
            if not states.is_floating_point():
                raise ArgumentError(f"an intervention at the {place.side} of {place.path}, which is {states.dtype}")
            changed = changed_values(given, chosen, item.tensors)
            if given.takes_everything:
                states = changed
            else:
                states = states.clone()
                states[slice(None) if index is None else index] = changed
        return states

    def _find_index(self, item: _Item, device: torch.device) -> Index:
        """Return the index of the values that are meant in this step: None for all, an empty one for none."""
        if item.choice not in self._indices:
            chosen_rows, chosen_positions = self._choices[item.choice]
            rows = _as_range(rows_in(chosen_rows, self._num_rows))
            positions = _as_range(positions_in(chosen_positions, self._past, self._num_new))
            is_all = (rows, positions) == (range(self._num_rows), range(self._num_new))
            self._indices[item.choice] = None if is_all else _index_of(rows, positions, device)
        return self._indices[item.choice]

    def _check_shape(self, place: _Place, states: Tensor) -> None:
        if states.shape[:2] != (self._num_rows, self._num_new):
            raise ArgumentError(
                f"rows and positions can't be chosen at the {place.side} of {place.path}: it has the shape {list(states.shape)}, "
                f"and not [rows, tokens, ...] of {[self._num_rows, self._num_new]} in front"
            )


def _as_range(indices: Any) -> Any:
    """Return a single index as a range, whose values need not be gathered."""
    is_single = len(indices) == 1 and isinstance(indices[0], int)
    return range(indices[0], indices[0] + 1) if is_single else indices


def _index_of(rows: Any, positions: Any, device: torch.device) -> Index:
    """Return rows and positions as an index of a tensor; an empty one if they are none."""
    is_by_row = bool(positions) and isinstance(positions[0], tuple)
    if not rows or not (positions[0] if is_by_row else positions):
        return ()
    if is_by_row and len(positions) != len(rows):
        raise ArgumentError(
            f"positions are given for {count_text(len(positions), 'row')}, and the step has {len(rows)}"
        )
    chosen_rows, columns = (
        slice(each.start, each.stop, each.step) if isinstance(each, range) else torch.tensor(each, device=device)
        for each in (rows, positions)
    )
    if is_by_row and isinstance(rows, range):
        chosen_rows = torch.tensor(list(rows), device=device)
    if isinstance(chosen_rows, Tensor) and isinstance(columns, Tensor):
        return chosen_rows[:, None], columns
    return chosen_rows, columns


def _captured(item: Capture, chosen: Tensor) -> Tensor:
    """Return a copy of values that later changes of them do not reach, in the dtype and reduced as asked."""
    chosen = chosen.detach()
    if item.dtype is not None:
        chosen = chosen.to(getattr(torch, item.dtype))
    match item.reduction:
        case "mean":
            return chosen.mean(1, keepdim=True)
        case "sum":
            return chosen.sum(1, keepdim=True)
        case "norm":
            norms: Tensor = chosen.norm(dim=-1)
            return norms
        case "last":
            chosen = chosen[:, -1:]
    return chosen.clone(memory_format=torch.contiguous_format)


def changed_values(item: Change, values: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """Return what an intervention makes of values, ``[rows, positions, ...]``, of the same shape and dtype."""
    match item.kind:
        case "add":
            changed = values + tensors[0].to(values)
        case "replace":
            changed = tensors[0].to(values).expand_as(values)
        case "scale":
            changed = values * (tensors[0].to(values) if tensors else item.numbers[0])  # type: ignore[operator]
        case "remove" | "keep":
            basis = tensors[0].to(values.device)
            part = ((values.to(basis.dtype) @ basis) @ basis.T).to(values.dtype)
            changed = part if item.kind == "keep" else values - part
        case "clamp":
            low, high = item.numbers
            if not tensors:
                changed = values.clamp(low, high)
            else:
                direction = tensors[0].to(values.device)
                along = values.to(direction.dtype) @ direction
                changed = values + ((along.clamp(low, high) - along)[..., None] * direction).to(values.dtype)
    if changed.shape != values.shape:
        raise ArgumentError(
            f"an intervention of the kind {item.kind!r} at {item.path} makes {list(changed.shape)} of values {list(values.shape)}"
        )
    return changed

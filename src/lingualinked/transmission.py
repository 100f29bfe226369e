"""The transmission map of a model: which tensors a stage uses beside the output of the layer before, and where none may begin.

Plain data; knows neither how it is found nor how tensors are sent.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from lingualinked.checks import MOST
from lingualinked.errors import ArgumentError, InfeasiblePlanError
from lingualinked.quantities import count_text

INPUT_IDS = "input_ids"
"""Name of the relay of token ids."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """A tensor that later stages use beside the output of the layer before.

    Parameters
    ----------
    name : str
        ``"input_ids"``, the path of a part (``"model.embed_tokens"``), or ``"layer 3"`` for the hidden output of layer 3.
    made_at : int
        The layer whose stage has it: 0 for token ids and for outputs of parts before the first layer, i for ``"layer i"``.
    used_at : tuple of int
        The layers that use it, in order; the number of layers stands for what runs after the last one.
    token_bytes : int
        Bytes per row and token when it is sent.
    part_bytes : int
        Weight bytes of the part, if stages that use its output may hold the part instead, which then needs token ids there;
        0 if they may not.

    Raises
    ------
    ArgumentError
        If it has no name, is used nowhere or before it is made, or a size is not from 0 to `checks.MOST`.
    """

    name: str
    made_at: int
    used_at: tuple[int, ...]
    token_bytes: int
    part_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise ArgumentError("a relay needs a name: input_ids, the path of a part, or 'layer 3'")
        if self.made_at < 0 or not _is_rising(self.used_at) or not self.used_at or self.used_at[0] < self.made_at:
            raise ArgumentError(
                f"relay {self.name!r} is made at layer {self.made_at} and used at {self.used_at}: "
                "give one layer or more, in order, none before it is made"
            )
        for name in ("token_bytes", "part_bytes"):
            if not 0 <= getattr(self, name) <= MOST:
                raise ArgumentError(f"{name}={getattr(self, name)} of relay {self.name!r} must be from 0 to {MOST}")

    @property
    def is_ids(self) -> bool:
        """Whether it is the token ids."""
        return self.name == INPUT_IDS

    def is_used_in(self, start: int, end: int, num_layers: int) -> bool:
        """Return whether layers ``[start, end)`` use it, or what runs after the last of `num_layers`, where they hold that one."""
        return any(start <= layer < end or (layer == end == num_layers) for layer in self.used_at)

    def is_sent_to(self, start: int, end: int, num_layers: int) -> bool:
        """Return whether a stage of layers ``[start, end)`` uses it, and another stage makes it."""
        return self.made_at < start and self.is_used_in(start, end, num_layers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transmission:
    """What crosses the boundaries between a model's stages beside hidden states, and which boundaries it forbids.

    Parameters
    ----------
    relays : tuple of Relay
        What some later layer uses beside the output of the layer before it; names differ.
    items : tuple of (tuple of bool or None)
        For each layer, which items of its output tuple the next layer uses; ``None``: its output is one tensor. Empty: one
        tensor from every layer.
    forbidden_cuts : tuple of int
        Layers that must lie in the same stage as the layer before them, in order.
    held : tuple of str
        Paths of the parts that every stage holds.

    Raises
    ------
    ArgumentError
        If two relays have one name, or a forbidden cut is before layer 1 or out of order.
    """

    relays: tuple[Relay, ...] = ()
    items: tuple[tuple[bool, ...] | None, ...] = ()
    forbidden_cuts: tuple[int, ...] = ()
    held: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [each.name for each in self.relays]
        if len(set(names)) < len(names):
            raise ArgumentError(f"relays {names} of a transmission map must have different names")
        if not _is_rising(self.forbidden_cuts) or any(cut < 1 for cut in self.forbidden_cuts):
            raise ArgumentError(
                f"forbidden_cuts={self.forbidden_cuts} must be layers from 1 on, each once and in order"
            )

    @property
    def part_bytes(self) -> dict[str, int]:
        """Weight bytes of each part that stages may hold instead of getting its output, by its path."""
        return {relay.name: relay.part_bytes for relay in self.relays if relay.part_bytes}

    def bytes_of(self, parts: Iterable[str]) -> int:
        """Return the weight bytes of parts that a stage holds instead of getting their outputs."""
        return sum(map(self.part_bytes.__getitem__, parts))

    def check_stage(self, start: int, held: Iterable[str]) -> None:
        """Raise InfeasiblePlanError if no stage may begin at a layer, or a part is none that stages may hold."""
        if start in self.forbidden_cuts:
            raise InfeasiblePlanError(
                f"the plan begins a stage at layer {start}, which must lie in the same stage as layer {start - 1}: the model "
                f"forbids cuts at layers {', '.join(map(str, self.forbidden_cuts))}; move the boundary"
            )
        for part in held:
            if part not in self.part_bytes:
                raise InfeasiblePlanError(
                    f"the plan has the stage from layer {start} on hold {part!r}, which is no part of this model that stages may "
                    f"hold: those are {sorted(self.part_bytes)}; solve for this model"
                )

    def check_layers(self, num_layers: int) -> None:
        """Raise ArgumentError if it is not of a model with that many layers."""
        if self.items and len(self.items) != num_layers:
            raise ArgumentError(
                f"items of a transmission map are of {count_text(len(self.items), 'layer')}, the model has {num_layers}"
            )
        for layer in self.forbidden_cuts:
            if layer >= num_layers:
                raise ArgumentError(f"forbidden cut {layer} is not inside a model of {count_text(num_layers, 'layer')}")
        for relay in self.relays:
            if relay.made_at >= num_layers or relay.used_at[-1] > num_layers:
                raise ArgumentError(
                    f"relay {relay.name!r} is made or used behind the {count_text(num_layers, 'layer')} of the model"
                )


def _is_rising(layers: tuple[int, ...]) -> bool:
    return all(before < after for before, after in itertools.pairwise(layers))

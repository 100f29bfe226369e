"""The transmission map of a model: which tensors a stage uses beside the output of the layer before, and where none may begin.

Such a tensor is a shortcut: it skips stages, and goes straight from the one that makes it to those that use it.

Plain data; knows neither how it is found nor how tensors are sent.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection

from lingualinked.checks import MOST
from lingualinked.errors import ArgumentError, InfeasiblePlanError
from lingualinked.quantities import count_text

INPUT_IDS = "input_ids"
"""Name of the shortcut of token ids."""

ID_BYTES = 8
"""Bytes of a token id."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shortcut:
    """A tensor that later stages use beside the output of the layer before; LinguaLinked's residual transmission sends it.

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
        Weight bytes of the part that makes it, if every stage may hold the part instead, which then needs token ids there; 0 if
        they may not.

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
            raise ArgumentError("a shortcut needs a name: input_ids, the path of a part, or 'layer 3'")
        if self.made_at < 0 or not _is_rising(self.used_at) or not self.used_at or self.used_at[0] < self.made_at:
            raise ArgumentError(
                f"shortcut {self.name!r} is made at layer {self.made_at} and used at {self.used_at}: "
                "give one layer or more, in order, none before it is made"
            )
        for name in ("token_bytes", "part_bytes"):
            if not 0 <= getattr(self, name) <= MOST:
                raise ArgumentError(f"{name}={getattr(self, name)} of shortcut {self.name!r} must be from 0 to {MOST}")

    @property
    def is_ids(self) -> bool:
        """Whether it is the token ids."""
        return self.name == INPUT_IDS

    @property
    def shows_text(self) -> bool:
        """Whether it is the token ids, or made of them before the first layer: an embedding shows which ids it is of."""
        return not self.is_of_layer

    @property
    def is_of_layer(self) -> bool:
        """Whether it is the hidden output of a layer."""
        return self.name.startswith("layer ")

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
    shortcuts : tuple of Shortcut
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
        If two shortcuts have one name, or a forbidden cut is before layer 1 or out of order.
    """

    shortcuts: tuple[Shortcut, ...] = ()
    items: tuple[tuple[bool, ...] | None, ...] = ()
    forbidden_cuts: tuple[int, ...] = ()
    held: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [each.name for each in self.shortcuts]
        if len(set(names)) < len(names):
            raise ArgumentError(f"shortcuts {names} of a transmission map must have different names")
        if not _is_rising(self.forbidden_cuts) or any(cut < 1 for cut in self.forbidden_cuts):
            raise ArgumentError(
                f"forbidden_cuts={self.forbidden_cuts} must be layers from 1 on, each once and in order"
            )

    def holding(self, parts: Collection[str], num_layers: int) -> Transmission:
        """Return the map where every stage holds some parts whose outputs were sent, and gets token ids for that; and no others.

        Raises InfeasiblePlanError if stages may not hold one of them.
        """
        unknown = [
            part
            for part in parts
            if not any(shortcut.name == part and shortcut.part_bytes for shortcut in self.shortcuts)
        ]
        if unknown:
            raise InfeasiblePlanError(
                f"the plan has every stage hold {', '.join(map(repr, unknown))}, which is no part of this model that stages may hold: "
                "solve for this model"
            )
        shortcuts = tuple(
            dataclasses.replace(shortcut, part_bytes=0) for shortcut in self.shortcuts if shortcut.name not in parts
        )
        if not parts:
            return dataclasses.replace(self, shortcuts=shortcuts)
        shortcuts = tuple(shortcut for shortcut in shortcuts if not shortcut.is_ids)
        everywhere = tuple(range(1, num_layers + 1))
        ids = Shortcut(name=INPUT_IDS, made_at=0, used_at=everywhere, token_bytes=ID_BYTES)
        return dataclasses.replace(self, shortcuts=(ids, *shortcuts), held=(*self.held, *parts))

    def bytes_of(self, parts: Collection[str]) -> int:
        """Return the weight bytes of parts whose outputs are shortcuts."""
        return sum(shortcut.part_bytes for shortcut in self.shortcuts if shortcut.name in parts)

    def check_cut(self, layer: int) -> None:
        """Raise InfeasiblePlanError if no stage may begin at a layer."""
        if layer in self.forbidden_cuts:
            raise InfeasiblePlanError(
                f"the plan begins a stage at layer {layer}, which must lie in the same stage as layer {layer - 1}: the model "
                f"forbids cuts at layers {', '.join(map(str, self.forbidden_cuts))}; move the boundary"
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
        for shortcut in self.shortcuts:
            if shortcut.made_at >= num_layers or shortcut.used_at[-1] > num_layers:
                raise ArgumentError(
                    f"shortcut {shortcut.name!r} is made or used behind the {count_text(num_layers, 'layer')} of the model"
                )


def _is_rising(layers: tuple[int, ...]) -> bool:
    return all(before < after for before, after in itertools.pairwise(layers))

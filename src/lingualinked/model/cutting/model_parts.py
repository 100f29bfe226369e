"""Where the parts of a model are, what they weigh, and what crosses the boundaries between its layers.

Plain data; knows neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

from lingualinked.errors import ArgumentError
from lingualinked.quantities import count_text
from lingualinked.transmission import Transmission
from lingualinked.weight_bytes import WeightBytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputShape:
    """The shape of a tensor that a part before the layers returns, or a layer."""

    path: str  # of the part, or "layer 3"
    shape: tuple[int | str, ...]  # "rows" and "tokens" are those of a step
    dtype: str  # "bfloat16"

    @property
    def is_regular(self) -> bool:
        """Whether it shows the numbers of rows and tokens of a step."""
        return {"rows", "tokens"} <= set(self.shape)

    def step_shape(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Return the numbers of rows and tokens of a step in which the tensor has these sizes; raise ArgumentError for others."""
        places = [self.shape.index(name) if name in self.shape else None for name in ("rows", "tokens")]
        if len(sizes) != len(self.shape) or None in places:
            raise ArgumentError(
                f"a tensor of shape {list(sizes)} does not come from {self.path}: {list(self.shape)} was due"
            )
        num_rows, num_new = (sizes[place] for place in places if place is not None)
        return num_rows, num_new

    def sizes(self, num_rows: int, num_new: int, num_past: int = 0) -> tuple[int, ...]:
        """Return the shape in a step behind `num_past` tokens, which count where "tokens" comes again: new ones by all."""
        known = {"rows": num_rows, "tokens": num_new}
        sizes = [known[size] if isinstance(size, str) else size for size in self.shape]
        for place in [place for place, size in enumerate(self.shape) if size == "tokens"][1:]:
            sizes[place] += num_past
        return tuple(sizes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """Where a model's parts are, as dotted paths of modules, and the bytes of their weights."""

    layers: str  # the decoder's module list: "model.layers"
    num_layers: int
    prologue: tuple[str, ...]  # modules with weights that run before the first layer, or never: ("model.embed_tokens",)
    epilogue: tuple[str, ...]  # modules with weights that run after the last layer: ("model.norm", "lm_head")
    weights: WeightBytes
    outputs: tuple[OutputShape, ...] = ()  # of the prologue, where a part returns one tensor
    layer_outputs: tuple[tuple[OutputShape, ...], ...] = ()  # of each layer: what the next one uses of it
    transmission: Transmission = dataclasses.field(default_factory=Transmission)
    changes_weights: bool = False  # whether the first forward pass changes weights, for all later ones
    head: str | None = (
        None  # the module that ends a class for a task; None for causal LMs, and for models without a head
    )
    dropped: tuple[str, ...] = ()  # modules with weights that no stage holds: ("model.vision_tower",)

    def span_bytes(self, start: int, end: int) -> int:
        """Return the weight bytes of a stage of layers ``[start, end)``; raise ArgumentError unless the model has them."""
        check_span(start, end, self.num_layers)
        return self.weights.of_span(start, end)

    def holding(self, parts: Collection[str]) -> ModelParts:
        """Return the parts of the model with every stage holding some, whose outputs are not sent then, and no others."""
        num_bytes = self.transmission.bytes_of(parts)
        weights = self.weights
        return dataclasses.replace(
            self,
            prologue=tuple(each for each in self.prologue if each not in parts),
            weights=dataclasses.replace(
                weights, prologue=weights.prologue - num_bytes, everywhere=weights.everywhere + num_bytes
            ),
            outputs=tuple(each for each in self.outputs if each.path not in parts),
            transmission=self.transmission.holding(parts, self.num_layers),
        )

    def shortcuts_to(self, start: int, end: int) -> tuple[str, ...]:
        """Return the names of the shortcuts that a stage of layers ``[start, end)`` receives."""
        return tuple(
            shortcut.name
            for shortcut in self.transmission.shortcuts
            if shortcut.is_sent_to(start, end, self.num_layers)
        )

    def needs(self, name: str, start: int, end: int) -> bool:
        """Return whether a stage of layers ``[start, end)`` may need a parameter, of its layers or of the ends of the model."""
        layer = self.layer_of(name)
        if layer is not None:
            return start <= layer < end
        return start == 0 or end == self.num_layers or self.is_in_every_stage(name)

    def is_kept_in(self, start: int, end: int) -> Callable[[str], bool]:
        """Return a function that tells whether an attribute's path is one of layers ``[start, end)``, or outside of all layers."""
        return lambda name: (layer := self.layer_of(name)) is None or start <= layer < end

    def is_in_every_stage(self, path: str) -> bool:
        """Return whether every stage runs a module for itself, such as what computes positions."""
        parts = (self.layers, *self.prologue, *self.epilogue, *self.dropped)
        is_in_one = any(f"{path}.".startswith(f"{each}.") for each in parts)
        return not (is_in_one or f"{self.layers}.".startswith(f"{path}."))

    def layer_beside(self, path: str, *, at_end: bool) -> int:
        """Return a layer whose stage runs a module; of one that runs all layers, its beginning or its end."""
        layer = self.layer_of(f"{path}.weight")
        runs_last = any(f"{path}.".startswith(f"{each}.") for each in self.epilogue)
        if layer is None and (runs_last or (at_end and f"{self.layers}.".startswith(f"{path}."))):
            return self.num_layers - 1
        return layer or 0

    def holds(self, path: str, start: int, end: int) -> bool:
        """Return whether a stage of layers ``[start, end)`` holds the module of a path: of a layer, or of an end of the model."""
        layer = self.layer_of(f"{path}.weight")
        if layer is not None:
            return start <= layer < end
        ends = (self.prologue if start == 0 else ()) + (self.epilogue if end == self.num_layers else ())
        return any(f"{path}.".startswith(f"{each}.") for each in (*ends, *self.transmission.held))

    def layer_of(self, name: str) -> int | None:
        """Return the layer of a parameter of the whole model, or None if it belongs to no layer."""
        path, _, rest = name.removeprefix(f"{self.layers}.").partition(".")
        return int(path) if name.startswith(f"{self.layers}.") and rest and path.isdecimal() else None


def check_span(start: int, end: int, num_layers: int) -> None:
    """Raise ArgumentError unless ``[start, end)`` is a span of a model of `num_layers` layers."""
    if not 0 <= start < end <= num_layers:
        raise ArgumentError(
            f"[{start}, {end}) is not a span of a model of {count_text(num_layers, 'layer')}: 0 <= start < end <= {num_layers} must hold"
        )

"""A list of layers that leaves out those that are skipped in a step.

Knows modules and indices; no steps, weights or KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lingualinked.model.cutting.cut import Boundary, RawOutput, ReplayLayer, StandIn
from lingualinked.model.stages.layer_skips import LayerSkips


class Bypass(StandIn):
    """Stands for a layer that is skipped: returns the hidden states that it is called with, as a layer does.

    `items` are those of the output tuple of a model's layers; None: they return one tensor.
    """

    def __init__(self, items: tuple[bool, ...] | None) -> None:
        super().__init__()
        self._others = None if items is None else (None,) * (len(items) - 1)

    def forward(self, states: Tensor, *_args: Any, **_kwargs: Any) -> RawOutput:
        """Return the hidden states."""
        return states if self._others is None else (states, *self._others)


class LayerList(nn.ModuleList):
    """A list of layers that iterates, for a forward pass, over those that are not skipped."""

    order: Sequence[nn.Module] | None = None  # the layers to run; None: all

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children_in_order() if self.order is None else self.order)

    def children_in_order(self) -> list[nn.Module]:
        """Return all layers, also those that are skipped at the moment."""
        return [layer for layer in self._modules.values() if layer is not None]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and self.order is not None:
            return self.order[index]
        return super().__getitem__(index)


class SpanOrder:
    """The layers to run in one forward pass over layers ``[start, end)``, with the stand-ins for those of other stages."""

    def __init__(
        self,
        layers: LayerList,
        start: int,
        end: int,
        skips: LayerSkips,
        boundary: Boundary,
        items: Sequence[tuple[bool, ...] | None],
    ) -> None:
        self.own: list[nn.Module] = []  # of the span
        self.order: list[nn.Module] = []
        for index, layer in enumerate(layers.children_in_order()):
            if index in skips.removed:
                continue
            is_own = start <= index < end
            self.order.append(Bypass(items[index]) if is_own and index in skips.bypassed else layer)
            if is_own:
                self.own.append(self.order[-1])
        # What comes from the stage before is given to the first own layer, if no layer is there to replay it.
        is_alone = sum(each < start for each in skips.removed) == start
        self.feeds_first = start > 0 and is_alone and bool(self.own)
        self.has_substitute = is_alone and not self.own  # a module that is not in the list: it passes on what comes in
        if self.has_substitute:
            self.order.insert(0, ReplayLayer(boundary) if start > 0 else Bypass(items[0]))
            self.own = self.order[:1]

    def feed_first(self, boundary: Boundary) -> Callable[..., Any]:
        """Return a pre-hook for the first own layer: it is called with what has come from the stage before."""

        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            incoming = boundary.incoming
            return (incoming[0] if isinstance(incoming, tuple) else incoming, *args[1:]), kwargs

        return feed

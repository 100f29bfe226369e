"""Computes the last layer only for the rows that have logits: of the other tokens of prompts, nothing but keys and values counts.

Knows the layer, its arguments and the attention function that it calls; no texts and no stages.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.exact.bits import have_equal_bits

if TYPE_CHECKING:
    from lingualinked.model.packed.packed_attention import Attend
    from lingualinked.model.packed.packed_cache import PackedStates

logger = logging.getLogger("lingualinked.worker")

_LEAST_SPARED = 16  # rows; fewer are not worth a second call
_BY_ROW = ("position_embeddings", "position_ids")  # arguments that have values for each row


class _AttentionDone(Exception):  # noqa: N818 - it ends the first call of the layer and is not an error
    """The layer has computed attention."""


class LastLayer:
    """The last layer of a model, in passes over several texts.

    Its own code runs twice: for all rows up to the result of attention, and for the rows with logits, which get their share of that
    result. In the first pass, the layer runs for all rows as well: if it is called otherwise than is known here, or has other bits, it
    does so in all passes.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._is_exact: bool | None = None  # None: not known yet
        self._observe: Callable[[Tensor], None] | None = None  # is told the results of attention
        self._attended: Tensor | None = None  # what attention is to return, once

    @contextlib.contextmanager
    def computed_for(self, rows: Sequence[int], num_rows: int) -> Iterator[None]:
        """Compute only these of so many rows, within the context; the others stay as the layer gets them. Needs `GLOBAL_STATE`.

        Needs the attention function that `wrap_attention` returns.
        """
        layer = vars(self._layer)
        if self._is_exact is False or num_rows - len(rows) < _LEAST_SPARED or "forward" in layer:
            yield
            return

        def forward(*args: Any, **kwargs: Any) -> Any:
            replaced = layer.pop("forward")
            try:
                chosen = torch.tensor(rows, dtype=torch.long, device=args[0].device)
                return (self._compare if self._is_exact is None else self._run_twice)(chosen, args, kwargs)
            finally:
                layer["forward"] = replaced
                self._observe = self._attended = None

        layer["forward"] = forward
        try:
            yield
        finally:
            del layer["forward"]

    def wrap_attention(self, attend: Attend, states: PackedStates) -> Attend:
        """Return a function that computes attention of a pass as another does, except where the layer has its result already."""

        def attend_once(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._attended is not None:
                states.take_layer(key, value)
                attended, self._attended = self._attended, None
                return attended, None
            result = attend(module, query, key, value, *args, **kwargs)
            if self._observe is not None:
                self._observe(result[0])
            return result

        return attend_once

    def _run_twice(self, rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the layer for all rows up to attention, and behind it for some; return the states of all."""
        attended: list[Tensor] = []

        def end(result: Tensor) -> None:
            attended.append(result)
            raise _AttentionDone

        self._observe = end
        with contextlib.suppress(_AttentionDone):
            self._layer.forward(*args, **kwargs)
        states: Tensor = args[0].clone()
        return states.index_copy_(1, rows, self._run_for(rows, attended[0], args, kwargs)) if len(rows) else states

    def _compare(self, rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer for all rows; find out whether those with logits have the same bits without the others."""
        attended: list[Tensor] = []
        self._observe = attended.append
        whole = self._layer.forward(*args, **kwargs)
        if not len(rows):
            return whole  # the next pass may show more
        self._is_exact = False
        try:
            if isinstance(whole, Tensor) and len(attended) == 1:
                some = self._run_for(rows, attended[0], args, kwargs)
                self._is_exact = have_equal_bits(some, whole.index_select(1, rows))
        except Exception as error:  # noqa: BLE001 - the layer has run for all rows, and does so from now on
            logger.debug("the last layer is always computed for all rows: %s", error)
        return whole

    def _run_for(self, rows: Tensor, attended: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        self._observe, self._attended = None, attended.index_select(1, rows)
        if len(args) != 1 or any(name not in _BY_ROW and isinstance(value, Tensor) for name, value in kwargs.items()):
            raise UnsupportedOperationError("it takes tensors of which it is not known whether they belong to rows")
        own = {name: _select(kwargs[name], rows) for name in _BY_ROW if name in kwargs}
        result: Tensor = self._layer.forward(args[0].index_select(1, rows), **{**kwargs, **own})
        if self._attended is not None:
            raise UnsupportedOperationError("it has not asked for attention")
        return result


def _select(value: Any, rows: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_select(each, rows) for each in value)
    return value.index_select(1, rows) if isinstance(value, Tensor) else value

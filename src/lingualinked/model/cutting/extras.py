"""Finds out which further arguments of a model's forward matter to a stage that sees no pictures, by a pass without data.

Knows modules and tensors; no stages and no sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingualinked.model.cutting.trace import NUM_TOKENS, NoData, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel


class _Watching(NoData):
    """Notes which of some tensors are touched."""

    def __init__(self, watched: dict[str, Tensor]) -> None:
        super().__init__()
        self.touched: set[str] = set()
        self._names = {id(tensor): name for name, tensor in watched.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for each in tensors_in((args, kwargs or {})):
            if id(each) in self._names:
                self.touched.add(self._names[id(each)])
        return super().__torch_function__(func, types, args, kwargs)


def picture_cuts(config: PreTrainedConfig, num_layers: int) -> frozenset[int]:
    """Return the layers that must lie with the first ones: a tower adds features behind as many layers as the configuration lists."""

    def sizes(fields: Mapping[str, Any]) -> Iterator[int]:
        for name, value in fields.items():
            if isinstance(value, dict):
                yield from sizes(value)
            elif "deepstack" in str(name) and isinstance(value, (list, tuple)):
                yield len(value)

    depth = max(sizes(config.to_dict()), default=0)
    return frozenset(range(1, min(depth + 1, num_layers)))


def used_arguments(meta_model: PreTrainedModel, names: Collection[str], *, has_positions: bool) -> frozenset[str]:
    """Return which of these arguments, integers, a forward pass on the meta device touches that is given no pictures.

    All, if it can't be run without data: their values matter then.
    """
    given = {name: torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta") for name in names}
    watching = _Watching(given)
    ids = torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta")
    positions = {"position_ids": torch.zeros_like(ids)} if has_positions else {}
    try:
        with torch.no_grad(), watching:
            meta_model(input_ids=ids, use_cache=False, **positions, **given)
    except Exception:  # noqa: BLE001 - whatever it is, the arguments' values matter
        return frozenset(names)
    return frozenset(watching.touched)

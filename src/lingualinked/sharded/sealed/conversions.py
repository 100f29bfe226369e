"""Accepts conversions of a model that would change nothing, such as ``.to(model.device)``; refuses all others.

Knows a model's dtypes, device and sizes; moves and converts nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch

logger = logging.getLogger("lingualinked.sharded")


class Conversions:
    """Mixin whose methods succeed where nothing has to change; comes before `UnsupportedOperations` in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        all_tied_weights_keys: dict[str, str]
        config: Any
        get_expanded_tied_weights_keys: Callable[..., dict[str, str]]
        get_input_embeddings: Callable[[], Any]
        named_buffers: Callable[[], Iterator[tuple[str, torch.Tensor]]]
        parameters: Callable[[], Iterator[torch.Tensor]]

        @property
        def device(self) -> torch.device: ...  # noqa: D102

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the model if this is its own device and dtype; refuse to move or convert it."""
        try:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # noqa: SLF001 - as nn.Module.to parses them
        except (RuntimeError, TypeError):
            return super().to(*args, **kwargs)  # type: ignore[misc, no-any-return]
        is_here = device is None or device.type == self.device.type
        if is_here and (dtype is None or self._has_dtype(dtype)):
            return self
        return super().to(*args, **kwargs)  # type: ignore[misc, no-any-return]

    def cpu(self) -> Self:
        """Return the model, whose inputs and logits are on the CPU."""
        return self

    def type(self, dst_type: torch.dtype | str | None = None) -> Self:
        """Return the model if its weights have this dtype; refuse to convert it."""
        try:
            # A tensor converts itself, since the type may be the name of a class of tensors ("torch.HalfTensor").
            dtype = None if dst_type is None else torch.empty(0).type(dst_type).dtype
        except (TypeError, ValueError):
            dtype = None
        return self if self._has_dtype(dtype) else super().type(dst_type)  # type: ignore[misc]

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing if the config ties the weights that are tied already; refuse to tie others."""
        asked = self.get_expanded_tied_weights_keys(all_submodels=True)
        if args or kwargs.get("missing_keys") is not None or asked != self.all_tied_weights_keys:
            super().tie_weights(*args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Return the embeddings if they have this number of rows already; refuse to resize them."""
        embeddings = self.get_input_embeddings()
        held = embeddings.num_embeddings
        if new_num_tokens not in (None, held) or held % (pad_to_multiple_of or 1):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)  # type: ignore[misc]
        return embeddings

    def set_attn_implementation(self, attn_implementation: Any = None, **kwargs: Any) -> None:
        """Do nothing if the stages use this implementation; refuse to change it."""
        if attn_implementation is None or attn_implementation != getattr(self.config, "_attn_implementation", None):
            super().set_attn_implementation(attn_implementation, **kwargs)  # type: ignore[misc]

    def _has_dtype(self, dtype: object) -> bool:
        """Return whether all floating weights have a dtype; if so, log the buffers that transformers would convert."""
        if any(each.is_floating_point() and each.dtype != dtype for each in self.parameters()):
            return False
        others = [name for name, each in self.named_buffers() if each.is_floating_point() and each.dtype != dtype]
        if others:
            logger.warning(
                "the weights are %s already; transformers would also round %s to it, but the stages keep their precision",
                dtype,
                ", ".join(others),
            )
        return True


def _conversion(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    def convert(self: Conversions, *args: Any) -> Any:
        return self if self._has_dtype(dtype) else getattr(super(Conversions, self), name)(*args)

    convert.__name__ = name
    convert.__doc__ = f"Return the model if its weights are {dtype}; refuse to convert it."
    return convert


for _name in ("bfloat16", "double", "float", "half"):
    setattr(Conversions, _name, _conversion(_name, getattr(torch, _name)))

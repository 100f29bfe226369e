"""Attention and masks of a pass over several texts: each text's own, by the functions that the model would have called.

Knows transformers' interfaces for both; no layers and no stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lingualinked.errors import UnsupportedOperationError
from lingualinked.kernels.attention import Text
from lingualinked.model.exact import exact_attention
from lingualinked.model.kv.kv_layers import GrowingLayer
from lingualinked.model.packed.packed_cache import PackedStates, TextPlace, not_through_interface
from lingualinked.model.process.torch_settings import one_thread

Attend = Callable[..., tuple[Tensor, Tensor | None]]


class PackedMask:
    """The masks of the texts of a pass, in order; a model passes it on to attention as it passes a tensor."""

    def __init__(self, masks: Sequence[Any]) -> None:
        self.masks = masks

    def __getattr__(self, name: str) -> NoReturn:
        raise not_through_interface(f"the model changes their mask ({name})")

    def __getitem__(self, _index: object) -> NoReturn:
        raise not_through_interface("the model cuts their mask")

    def __radd__(self, _other: object) -> NoReturn:
        raise not_through_interface("the model adds their mask to scores by itself")

    __add__ = __radd__


class PackedAttention:
    """Computes attention, and makes masks, text by text in one pass."""

    def __init__(
        self, places: Sequence[TextPlace], states: PackedStates, num_ghosts: int, *, with_one_thread: bool = False
    ) -> None:
        self._places = places
        self._with_one_thread = with_one_thread
        self._states = states
        self._num_ghosts = num_ghosts
        self._sizes = [*(place.num_new for place in places), *([num_ghosts] if num_ghosts else ())]

    def wrap_attention(self, attend: Attend) -> Attend:
        """Return a function for all texts, in place of one for a batch."""
        attend_texts = functools.partial(self._attend, attend)
        return one_thread()(attend_texts) if self._with_one_thread else attend_texts

    def wrap_mask(self, make_mask: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that makes the masks of all texts, in place of one for a batch."""
        return functools.partial(self._make_masks, make_mask)

    def _attend(
        self,
        attend: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: PackedMask | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and not isinstance(attention_mask, PackedMask):
            raise not_through_interface("the model makes their mask by itself")
        masks = [None] * len(self._places) if attention_mask is None else attention_mask.masks
        _check_arguments(kwargs)
        layer = self._states.take_layer(key, value)
        # 1) compute the texts with one new token together, where the kernel has the bits of their attention
        texts: dict[int, Text] = {}
        is_known = attend is exact_attention.attend and not args
        if is_known and exact_attention.uses_kernel_for_texts(module, query, key, value, kwargs):
            texts = self._describe_texts(layer, masks, key)
        if texts:
            together = exact_attention.attend_texts(query, key, value, [*texts.values()], kwargs.get("scaling"))
            if len(texts) == len(self._places) and not self._num_ghosts:
                return together, None
        # 2) compute the others one by one
        parts = [each.split(self._sizes, dim=2) for each in (query, key, value)]
        outputs: list[Tensor] = []
        for number, (place, mask, own, *new) in enumerate(
            zip(self._places, masks, *parts, strict=False)
        ):  # without ghosts
            if number in texts:
                outputs.append(together[:, place.start : place.stop])
            else:
                held = place.cache.owned[layer].update(*new)
                outputs.append(attend(module, own, *held, mask, *args, **_own_arguments(kwargs, place))[0])
        if self._num_ghosts:
            outputs.append(outputs[-1][:, -1:].expand(-1, self._num_ghosts, -1, -1))
        return torch.cat(outputs, dim=1), None

    def _describe_texts(self, layer: int, masks: Sequence[Any], key: Tensor) -> dict[int, Text]:
        """Make room for the new token of each text that has one, no mask, and growing KV; describe them by number."""
        texts = {}
        for number, (place, mask) in enumerate(zip(self._places, masks, strict=True)):
            own = place.cache.owned[layer]
            if place.num_new == 1 and mask is None and type(own) is GrowingLayer:
                locations = own.make_room(key.dtype)
                if locations is not None:
                    texts[number] = Text(*locations, own.get_seq_length(), place.start, appends=True)
        return texts

    def _make_masks(
        self,
        make_mask: Callable[..., Any],
        *,
        q_length: int,  # noqa: ARG002 - of all texts, which have lengths of their own
        kv_length: int,  # noqa: ARG002 - likewise
        q_offset: int,  # noqa: ARG002 - likewise
        kv_offset: int,  # noqa: ARG002 - likewise
        attention_mask: Tensor | None,  # noqa: ARG002 - no text has padding
        allow_is_causal_skip: bool = True,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> PackedMask:
        layer, masks = self._states.mask_layer, []
        for place in self._places:
            cache = place.cache.hf
            length, offset = cache.get_mask_sizes(place.num_new, layer)
            own = None
            if place.cache.is_static:  # as `generate` gives it, which decides whether a mask is made
                own = torch.ones((1, place.cache.num_tokens + place.num_new), dtype=torch.bool, device=device)
            masks.append(
                make_mask(
                    q_length=place.num_new,
                    kv_length=length,
                    q_offset=cache.get_query_offset(layer),
                    kv_offset=offset,
                    attention_mask=own,
                    allow_is_causal_skip=allow_is_causal_skip and not (cache.is_compileable and place.num_new == 1),
                    device=device,
                    **kwargs,
                )
            )
        return PackedMask(masks)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse tensors that belong to tokens in a way that is not known; what belongs to heads is the same for all texts."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.ndim > 1 and name != "position_ids":
            raise UnsupportedOperationError(
                f"packed steps do not know how to share out {name!r}, which the model's attention takes, among texts; use "
                "ordinary steps"
            )


def _own_arguments(arguments: Mapping[str, Any], place: TextPlace) -> Mapping[str, Any]:
    """Return the arguments of attention for one text."""
    positions = arguments.get("position_ids")
    if positions is None:
        return arguments
    return {**arguments, "position_ids": positions.narrow(-1, place.start, place.num_new)}

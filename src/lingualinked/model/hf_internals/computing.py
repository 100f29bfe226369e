"""What models of transformers compute with: attention, masks, rotary embeddings, the loss of experts.

Knows functions that a model's code calls; no spans and no stages.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

torch_attention = sdpa_attention_forward
"""The function by which models compute attention as "sdpa"."""


_ROTATION = "apply_rotary_pos_emb"


def number_of_heads(config: Any) -> int:
    """Return the number of attention heads of a text configuration; 0 if it has none, or layers have different numbers."""
    try:
        return int(getattr(config, "num_attention_heads", 0) or 0)
    except RuntimeError:  # what transformers raises where layers have their own numbers
        return 0


@contextlib.contextmanager
def computed_attention(attend: Callable[..., Any]) -> Iterator[None]:
    """Make models that compute attention as "sdpa" call `attend` in place of `torch_attention`, within the context.

    Does nothing if another function has been registered. Needs `GLOBAL_STATE`.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not torch_attention:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def calls_attention(attend: Callable[..., Any]) -> bool:
    """Return whether a model that computes attention as "sdpa" calls this function now, and nothing wraps it."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is attend and "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def rotation_of(module: torch.nn.Module) -> Any:
    """Return the rotary function that a module's code calls now; None if it has none."""
    return getattr(sys.modules.get(type(module).__module__), _ROTATION, None)


def rotary_modules(model: torch.nn.Module) -> list[Any]:
    """Find the Python modules of a model's code that have a function of their own for rotary embeddings."""
    names = {type(module).__module__ for module in model.modules()}
    found = [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]
    return [each for each in found if isinstance(getattr(each, _ROTATION, None), FunctionType)]


@contextlib.contextmanager
def computed_rotation(modules: Iterable[Any], faster: Callable[[Any], Any]) -> Iterator[None]:
    """Make the code in some Python modules call ``faster(function)`` in place of its rotary function, within the context.

    Needs `GLOBAL_STATE`.
    """
    before = [(module, getattr(module, _ROTATION)) for module in modules]
    for module, function in before:
        setattr(module, _ROTATION, faster(function))
    try:
        yield
    finally:
        for module, function in before:
            setattr(module, _ROTATION, function)


class DynamicRope:
    """A rotary embedding, of one type of layers or of all, that long texts stretch, and that stays stretched."""

    def __init__(self, module: torch.nn.Module, layer_type: str | None) -> None:
        self._module = module
        self._arguments = {} if layer_type is None else {"layer_type": layer_type}
        self._prefix = "" if layer_type is None else f"{layer_type}_"

    @property
    def unstretched(self) -> int:
        """The length of text up to which it is not stretched."""
        return int(self._module.original_max_seq_len)  # type: ignore[arg-type]

    def stretch(self, num_tokens: int, device: torch.device) -> None:
        """Put the embedding into its state after a text of `num_tokens` tokens, whatever its present state."""
        module: Any = self._module
        reach = getattr(module, f"{self._prefix}max_seq_len_cached", module.max_seq_len_cached)
        if int(reach) != num_tokens:
            for position in (0, num_tokens - 1):  # a short text first, which resets the stretching
                positions = torch.tensor([[position]], device=device)
                module(torch.empty(0, device=device), positions, **self._arguments)


def dynamic_ropes(model: torch.nn.Module) -> list[DynamicRope]:
    """Find the rotary embeddings that keep state from one forward pass to the next."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None) if hasattr(module, "max_seq_len_cached") else None
        by_type = kinds if isinstance(kinds, dict) else {None: kinds or ""}
        found += [DynamicRope(module, layer_type) for layer_type, kind in by_type.items() if "dynamic" in kind]
    return found


def length_ropes(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Find the rotary embeddings that depend on the length of the text, whether they keep state or not."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", "") if hasattr(module, "max_seq_len_cached") else ""
        of_types = kinds.values() if isinstance(kinds, dict) else [kinds or ""]
        if any("dynamic" in kind or kind == "longrope" for kind in of_types):
            found.append(module)
    return found


def make_masks(
    config: Any,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    position_ids: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Make the masks of a step of one token as ``generate`` does for a static cache, by type of layers; "" if there is one type.

    `states` are ``[rows, 1, ...]``; the masks are ``[rows, 1, 1, tokens]``.
    """
    like = torch.empty((*states.shape[:2], 0), dtype=config.dtype, device=states.device)
    made = create_masks_for_generate(config, like, attention_mask, cache, position_ids)
    return made if isinstance(made, dict) else {"": made}


def balancing_loss(model: Any, router_logits: tuple[Any, ...], attention_mask: torch.Tensor | None) -> Any:
    """Return the loss that the class of a model of experts adds for experts that are used unequally; None if it has none."""
    compute = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if compute is None:
        return None
    return compute(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)


@contextlib.contextmanager
def replaced_attention(
    wrap_attention: Callable[[Callable[..., Any]], Callable[..., Any]],
    wrap_mask: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Wrap the attention function that models get from transformers' interface, and the one that makes masks, within the context.

    Needs `GLOBAL_STATE`.
    """
    get_interface = ALL_ATTENTION_FUNCTIONS.get_interface
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    own_masks = dict(masks._local_mapping)

    def get_wrapped(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return wrap_attention(get_interface(implementation, default))

    vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = get_wrapped
    masks._local_mapping.update({name: wrap_mask(function) for name, function in masks.items()})
    try:
        yield
    finally:
        del vars(ALL_ATTENTION_FUNCTIONS)["get_interface"]
        masks._local_mapping.clear()
        masks._local_mapping.update(own_masks)


@contextlib.contextmanager
def experts_in_pairs() -> Iterator[None]:
    """Make an expert that one row has come to multiply two, since one has other bits, within the context. Needs `GLOBAL_STATE`.

    That is for the function that all models of experts call by default, which multiplies the rows of each expert apart.
    """
    own = moe._grouped_mm
    moe._grouped_mm = functools.partial(_multiply_pairs, own)
    try:
        yield
    finally:
        moe._grouped_mm = own


def _multiply_pairs(own: Callable[..., Any], rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> Any:
    """Multiply the rows up to each of `offs` with an expert's weight, by transformers' function, single ones twice."""
    counts = torch.diff(offs, prepend=offs.new_zeros(1))
    if not bool((counts == 1).any()):
        return own(rows, weight, offs=offs)
    is_single = torch.repeat_interleave(counts == 1, counts)
    num_rows = int(offs[-1])
    doubled = rows[:num_rows].repeat_interleave(1 + is_single.long(), dim=0)
    product = own(doubled, weight, offs=torch.cumsum(counts + (counts == 1), 0).to(offs.dtype))
    places = torch.arange(num_rows, device=rows.device) + torch.cumsum(is_single, 0) - is_single.long()
    return torch.cat([product[places], product.new_zeros(len(rows) - num_rows, product.shape[1])])


def uses_interface(model: Any) -> bool:
    """Whether the attention of a model's class goes through transformers' interface, as its source shows."""
    return bool(model._can_set_attn_implementation())


def attention_implementation(model: Any) -> str | None:
    """Return the name by which a model finds its attention function."""
    name: str | None = model.config.get_text_config()._attn_implementation
    return name

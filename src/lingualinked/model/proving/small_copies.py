"""Small copies of a configuration: of the same kind in all that its forward pass depends on, a few thousand parameters wide.

Knows the names that configurations give to sizes, and no architecture; a copy that transformers can't run is not noticed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

VOCABULARY = 512

_LEAST_WIDTH, _LEAST_HEAD, _WINDOW, _EXPERTS, _FEWEST_LAYERS = 32, 8, 8, 4, 4
_MAX_PERIOD = 12  # of a pattern of layers

# Names of sizes, by what is done to them. Each is searched for in the order of `_copy_field`.
_DEPTH = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|num_blocks|depth|(num_)?(encoder|decoder)_layers|num_layers_per_stack)$"
)
_HEADS = re.compile(r"(heads|^n_head|heads_per_layer|(?<!mem)n_?groups|query_groups|^o_groups)$")
_VOCABULARY = re.compile(r"vocab")
_WINDOWS = re.compile(
    r"(sliding_window(_size)?|window_size|attention_chunk_size|local_attention|index_topk|indexer_budget|keep_window_size|chunk_size)$"
)
_NUM_EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num)$")
_EXPERT_GROUPS = re.compile(r"^(n_group|num_expert_group)$")
_EXPERTS_USED = re.compile(r"^(num_experts_per_tok(en)?|moe_topk|moe_k|top_k|moe_top_k|num_selected_experts)$")
_PERIOD = re.compile(r"(_period|_pattern|_interval|every_n_layers|layer_group_size|layers_per_attn_res_block)$")
_EVERY = re.compile(r"^rescale_every$")  # so many layers, something is done that does not depend on their kind
_LAYER_INDICES = re.compile(r"(layers|layer_ids|idxs|layer_indices|block_indexes|visual_indexes)$")
_FIRST_LAYERS = re.compile(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$")
_LAYER_NUMBER = re.compile(r"^(max_window_layers|moe_layer_end_index)$")
_SECTIONS = re.compile(
    r"^(mrope_section|short_factor|long_factor)$"
)  # as many, or in sum as many, as half a head is wide
_WIDTH = re.compile(
    r"(hidden_size|intermediate|head_dim|head_size|headdim|_dim$|^dim_|_head$|^d_model|d_inner|d_kv|d_ff|^dff|n_embd|ffn|rank$"
    r"|lowrank|lru_width|kv_channels|state_size|d_state|d_ssm|embedding_size|embd|^d_rel|(in|out)put_size$|feed_forward|n_inner|^hidden_dim)"
)
_NO_WIDTH = re.compile(
    r"(vocab|kernel|multiple|chunk|window|^num_|^use_|pattern|factor|group_size|dim_conv|^conv|layer|_heads$)"
)
_HEAD_WIDTH = re.compile(r"(head_dim|dim_head|d_head|d_kv|kv_channels|head_size|headdim|rotary_dim)$")
_TOWER = re.compile(r"^(?!.*(text|llm|language|decoder|thinker|attn|ffn)).*_config$")  # whose widths are its own
_MAIN_WIDTH = ("hidden_size", "n_embd", "d_model", "embedding_dim", "emb_dim")
_MAIN_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass(frozen=True, slots=True)
class _Variant:
    """What is tried when narrow copies of the first kind can't be run."""

    num_each: int = 1  # of the first layers of each kind that are kept
    keeps_windows: bool = False


_VARIANTS = (_Variant(), _Variant(num_each=2), _Variant(keeps_windows=True))


@dataclass(frozen=True, slots=True)
class _Scale:
    """What widths are divided by."""

    heads: int  # of their numbers
    head_width: int  # of their dimensions; all other widths are divided by the product
    variant: _Variant

    @property
    def width(self) -> int:
        return self.heads * self.head_width


def small_copies(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield copies of a configuration, the narrowest first, that its class accepts.

    Numbers of heads are divided by one power of two, dimensions of heads by another, and all other widths by both, so that
    what is a product of two of them stays one. Lists with an entry for each layer are cut to the first layers that
    have all kinds; windows, vocabulary and experts are few.

    Parameters
    ----------
    config : PreTrainedConfig
        Of a model of any size; it is not changed.

    Yields
    ------
    PreTrainedConfig
        The widest is as wide as `config`.
    """
    fields = config.to_dict()
    text = config.get_text_config(decoder=True).to_dict()
    for scale in _scales(text):
        try:
            small = _copy_fields(fields, scale)
            copy = type(config).from_dict(small)
        except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError, _Indivisible):
            continue  # what it needs beside this division is its own
        copy.architectures = config.architectures
        yield copy


class _Indivisible(Exception):  # noqa: N818 - it chooses another scale
    """A width is not a multiple of what it would be divided by."""


def _scales(fields: Mapping[str, Any]) -> Iterator[_Scale]:
    """Yield ways of dividing, the narrowest first."""
    width, heads = (_first_of(fields, names) for names in (_MAIN_WIDTH, _MAIN_HEADS))
    dims = [value for name, value in fields.items() if _HEAD_WIDTH.search(name) and _is_size(value)]
    if not dims and width and heads:
        dims = [width // heads]
    powers = [1 << exponent for exponent in range(10)]
    factors = [
        (of_heads, of_dims)
        for of_heads in powers
        for of_dims in powers
        if not width or (width % (of_heads * of_dims * 8) == 0 and width // (of_heads * of_dims) >= _LEAST_WIDTH)
        if of_heads == 1 or (heads % of_heads == 0 and heads // of_heads >= 2)
        if of_dims == 1 or all(dim % (of_dims * _LEAST_HEAD) == 0 or dim < _LEAST_HEAD for dim in dims)
    ]
    # Of equal widths the one whose heads are widest: parts of them are rotated, or shared by keys of several kinds.
    narrowest = sorted(factors or [(1, 1)], key=lambda each: (-each[0] * each[1], each[1]))
    for variant in _VARIANTS:
        yield from (_Scale(*each, variant) for each in narrowest)


def _scale_of_tower(fields: Mapping[str, Any], scale: _Scale) -> _Scale:
    """Return how to divide the widths of a tower beside the text model by as much, with fewer heads to divide."""
    numbers = [value for name, value in fields.items() if _HEADS.search(name) and _is_size(value)]
    of_heads = scale.heads
    while of_heads > 1 and any(value % (2 * of_heads) for value in numbers):
        of_heads //= 2
    return _Scale(of_heads, scale.width // of_heads, scale.variant)


def _copy_fields(fields: Mapping[str, Any], scale: _Scale) -> dict[str, Any]:
    """Copy the fields of a configuration, or of one in it."""
    depth_names = [name for name, value in fields.items() if _DEPTH.search(name) and _is_size(value)]
    depth = fields[depth_names[0]] if depth_names else 0
    shared = fields.get("num_kv_shared_layers") or 0
    kept = _num_kept(fields, depth, scale.variant.num_each)
    num_shared = min(shared, kept)
    if depth:
        kept = min(depth, kept + num_shared)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in depth_names:
            small[name] = max(1, min(value, kept if value == depth else value * kept // depth))
        elif name == "num_kv_shared_layers":
            small[name] = value and num_shared
        else:
            small[name] = _copy_field(name, value, scale, depth, kept)
    _match_experts(fields, small)
    _keep_ids_in_vocabulary(small)
    return small


def _copy_field(name: str, value: Any, scale: _Scale, depth: int, kept: int) -> Any:
    """Copy one field by what its name says that it counts."""
    if isinstance(value, dict):
        if name in ("id2label", "label2id"):
            return value
        if depth and value and all(str(key).isdecimal() for key in value):  # by layer
            kept_layers = {key: each for key, each in value.items() if int(key) < kept}
            return {key: _copy_field("layer", each, scale, 0, 0) for key, each in kept_layers.items()}
        return _copy_fields(value, _scale_of_tower(value, scale) if _TOWER.search(name) else scale)
    if isinstance(value, (list, tuple)):
        return _copy_list(name, list(value), scale, depth, kept)
    if not _is_size(value):
        return value
    for pattern, limit in ((_VOCABULARY, VOCABULARY), (_WINDOWS, _WINDOW), (_NUM_EXPERTS, _EXPERTS)):
        if pattern.search(name):
            return value if scale.variant.keeps_windows and pattern is _WINDOWS else min(value, limit)
    if _EVERY.search(name):
        return min(value, 2)
    if _LAYER_NUMBER.search(name):
        return value if value < kept else kept // 2 if name == "max_window_layers" else kept - 1
    if _HEADS.search(name):
        return _divided_heads(name, value, scale)
    if _HEAD_WIDTH.search(name):
        return _divided(value, scale.head_width)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name):
        return _divided_width(name, value, scale)
    return value


def _copy_list(name: str, values: list[Any], scale: _Scale, depth: int, kept: int) -> list[Any]:
    """Copy a list: of entries by layer, of layers, or of parts of a head."""
    if _SECTIONS.search(name):
        if name == "mrope_section":
            return [_divided(value, scale.head_width) for value in values]
        return values[: _divided(len(values), scale.head_width)]
    if depth and len(values) == depth:
        return [_copy_field(name, value, scale, 0, 0) if _is_size(value) else value for value in values[:kept]]
    if depth and _LAYER_INDICES.search(name) and all(_is_index(value) for value in values):
        return [value for value in values if value < kept]
    return values


def _num_kept(fields: Mapping[str, Any], depth: int, num_each: int) -> int:
    """Return how many of the first layers have all kinds of layers."""
    kept = _FEWEST_LAYERS
    for name, value in fields.items():
        if _is_size(value) and _PERIOD.search(name) and value <= _MAX_PERIOD:
            kept = max(kept, value + 1)
        if _is_size(value) and _FIRST_LAYERS.search(name):
            kept = max(kept, min(value, _FEWEST_LAYERS) + 1)
        if isinstance(value, (list, tuple)) and depth and len(value) == depth:
            kinds = list(map(str, value))
            if len(set(kinds)) <= _FEWEST_LAYERS:  # else a number for each layer
                places = ([i for i, each in enumerate(kinds) if each == kind] for kind in set(kinds))
                kept = max(kept, *(each[min(num_each, len(each)) - 1] + 1 for each in places))
        elif isinstance(value, (list, tuple)) and depth and _LAYER_INDICES.search(name):
            kept = max(kept, min((each for each in value if _is_index(each)), default=0) + 2)
    return min(depth, kept) if depth else kept


def _divided(value: int, factor: int) -> int:
    if value % factor:
        raise _Indivisible
    return value // factor


def _divided_heads(name: str, value: int, scale: _Scale) -> int:
    """Divide a number of heads; what several heads share, such as keys, stays two if it was."""
    if value % scale.heads == 0 and value // scale.heads >= 2:
        return value // scale.heads
    if value > 1 and ("attention_heads" in name or name in _MAIN_HEADS):
        raise _Indivisible
    return min(value, 2)


def _divided_width(name: str, value: int, scale: _Scale) -> int:
    """Divide a width; one that others do not follow from is rounded to what matrix products of experts can be wide."""
    divided = value // scale.width
    if value % scale.width and not _is_free(name):
        return value if name.endswith("put_size") else max(1, divided)
    return max(8, divided // 8 * 8) if value % 8 == 0 and _is_free(name) else max(1, divided)


def _is_free(name: str) -> bool:
    return re.search(r"(intermediate|ffn|^d_?ff|dim_ff|rank|feed_forward)", name) is not None


def _match_experts(fields: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Let few experts be in few groups, and fewer be used."""
    groups = [name for name in small if _EXPERT_GROUPS.search(name) and (small[name] or 0) > 1]
    for name in groups:
        small[name] = 2
    for name in small:
        if _NUM_EXPERTS.search(name) and _is_size(fields[name]) and groups:
            small[name] = min(fields[name], 2 * _EXPERTS)
    if groups and _is_size(small.get("topk_group")):
        small["topk_group"] = 1 if small["topk_group"] < max(fields[name] for name in groups) else 2
    if any(_NUM_EXPERTS.search(name) and _is_size(fields[name]) for name in small):
        used = {name: value for name, value in small.items() if _EXPERTS_USED.search(name) and _is_size(value)}
        small.update({name: min(value, 2) for name, value in used.items()})


def _keep_ids_in_vocabulary(small: dict[str, Any]) -> None:
    """Give special tokens ids that the vocabulary has, each its own."""
    size = small.get("vocab_size")
    if not isinstance(size, int):
        return
    mapped: dict[int, int] = {}

    def keep(value: Any) -> Any:
        if isinstance(value, list):
            return [keep(each) for each in value]
        if not _is_index(value) or value < size:
            return value
        return mapped.setdefault(value, size - 1 - len(mapped))

    for name, value in small.items():
        if re.search(r"(_token_id|_token_index)$", name):
            small[name] = keep(value)


def _first_of(fields: Mapping[str, Any], names: Sequence[str]) -> int:
    return next((fields[name] for name in names if _is_size(fields.get(name))), 0)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_index(value) and value > 0

"""Measures the bytes of a model's KV and hidden states, and finds which of its layers are of the same kind.

Works on the meta device, without weights; knows no stages and no devices.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from lingualinked.errors import UncuttableModelError
from lingualinked.model.cutting.cut import flatten_output
from lingualinked.model.cutting.heads import HeadPass, cache_argument_of
from lingualinked.model.cutting.model_parts import ModelParts, OutputShape
from lingualinked.model.cutting.parts import build_meta, cache_slots, learned_positions
from lingualinked.model.cutting.trace import NoData, unchecked_distributions
from lingualinked.model.hf_internals.cache_arguments import supports_cache
from lingualinked.model.kv.kept_values import KeptValues, tensors_in
from lingualinked.model.kv.layer_state import walk
from lingualinked.model.stages.module_state import ModuleState
from lingualinked.profile import ModelProfile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from lingualinked.model.cutting.cut import RawOutput
    from lingualinked.model.spec import ModelSpec

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)

_NUM_TOKENS = 2  # of the forward pass; what a layer keeps of one token more is seen in a second one


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The sizes of a model."""

    spec: ModelSpec
    profile: ModelProfile


def measure_footprint(meta_model: PreTrainedModel, parts: ModelParts, spec: ModelSpec) -> Footprint:
    """Measure a model in bytes, from one or two forward passes on the meta device without data."""
    layers = meta_model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    itemsize: int = getattr(torch, spec.dtype).itemsize
    model = meta_model
    try:
        cache, modules, output, logits = _run_without_data(model, parts)
    except UncuttableModelError:
        # Some kernels do not support one dtype on the meta device; shapes are the same in another.
        model = build_meta(replace(spec, dtype="float32" if spec.dtype == "bfloat16" else "bfloat16"))
        cache, modules, output, logits = _run_without_data(model, parts)
    is_plain = isinstance(cache, DynamicCache) and all(type(each) in _PLAIN for each in cache.layers)
    longer = None if is_plain or cache is None else _run_without_data(model, parts, _NUM_TOKENS + 1)[0]
    kv_bytes, state_bytes, windows, kinds = [], [], [], []
    for index, layer in enumerate(layers):
        kept = _kept_of(cache, layer)
        short = _num_bytes(kept, model, itemsize, len(layers))
        grown = short // _NUM_TOKENS
        if longer is not None:
            grown = max(0, _num_bytes(_kept_of(longer, layer), model, itemsize, len(layers)) - short)
        kv_bytes.append(grown)
        in_modules = [value for name, value in modules.values.items() if parts.layer_of(name) == index]
        state_bytes.append(max(0, short - _NUM_TOKENS * grown) + sum(each.nbytes for each in tensors_in(in_modules)))
        # A window of one token keeps the whole text, in transformers as here.
        widths = [
            each.sliding_window for each in kept if type(each) is DynamicSlidingWindowLayer and each.sliding_window > 1
        ]
        windows.append(min(widths, default=None))
        shapes = [f"{name} {list(each.shape)} {each.dtype}" for name, each in layer.named_parameters()]
        kinds.append((type(layer).__name__, windows[-1], kv_bytes[-1], state_bytes[-1], tuple(shapes)))
    distinct = list(dict.fromkeys(kinds))
    widest = max(max(parameter.shape) for layer in layers for parameter in layer.parameters())
    (hidden,), _ = flatten_output(output)
    hidden_bytes = max(hidden.numel() * itemsize // _NUM_TOKENS, *map(_token_bytes, parts.layer_outputs))
    profile = ModelProfile(
        name=str(meta_model.config.name_or_path or spec.class_name),
        fingerprint=_fingerprint(spec),
        dtype=spec.dtype,
        kinds=tuple(f"{name}, window {window}" if window else name for name, window, *_ in distinct),
        kind_of_layer=tuple(distinct.index(kind) for kind in kinds),
        layer_weight_bytes=parts.weights.layers,
        layer_kv_bytes=tuple(kv_bytes),
        layer_state_bytes=tuple(state_bytes),
        layer_windows=tuple(windows),
        prologue_bytes=parts.weights.prologue,
        epilogue_bytes=parts.weights.epilogue,
        tied_bytes=parts.weights.tied,
        hidden_bytes=hidden_bytes,
        logits_bytes=logits.numel() * itemsize // _NUM_TOKENS,
        # An estimate: a few copies of the hidden states, partly in float32, and the three widest results of a gated block.
        working_bytes=12 * hidden_bytes + 3 * widest * itemsize,
        max_positions=learned_positions(meta_model),
        everywhere_bytes=parts.weights.everywhere,
        transmission=parts.transmission,
    )
    return Footprint(spec=spec, profile=profile)


def _token_bytes(outputs: Iterable[OutputShape]) -> int:
    """Return the bytes per row and token of what a layer gives the next one."""
    return sum(
        math.prod(size for size in each.shape if isinstance(size, int)) * getattr(torch, each.dtype).itemsize
        for each in outputs
        if "tokens" in each.shape
    )


def _kept_of(cache: Any, layer: nn.Module) -> list[Any]:
    """Return what a cache holds for a layer; of an object of the model's own, all."""
    if isinstance(cache, DynamicCache):
        return [cache.layers[slot] for slot in sorted(cache_slots([layer])) if slot < len(cache.layers)]
    return [] if cache is None else [cache]


def _num_bytes(kept: list[Any], model: PreTrainedModel, itemsize: int, num_layers: int) -> int:
    """Return the bytes of all tensors that a layer keeps, where `itemsize` is that of the model's own dtype.

    Of an object of the model's own, each layer has as much as the others.
    """
    tensors = [each for _, each in walk([each if isinstance(each, list | tuple) else vars(each) for each in kept])]
    held = {id(each): each for each in tensors if isinstance(each, Tensor) and each.ndim > 1}.values()
    total = sum(each.numel() * (itemsize if each.dtype is model.dtype else each.element_size()) for each in held)
    return (
        total
        if all(isinstance(each, CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer) for each in kept)
        else total // num_layers
    )


def _fingerprint(spec: ModelSpec) -> str:
    """Return a digest of everything that a model's shapes and times depend on, which excludes the place of its files."""
    config = json.loads(spec.config_json)
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    code = [] if spec.code is None else [file.digest for file in spec.code.files]
    facts = [spec.class_name, spec.dtype, spec.attn_implementation, spec.stack, config, *code]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _run_without_data(
    model: PreTrainedModel, parts: ModelParts, num_tokens: int = _NUM_TOKENS
) -> tuple[Any, KeptValues, RawOutput, Tensor]:
    """Run the whole model on the meta device; return its KV cache, what modules keep, the last layer's raw output, and the logits."""
    modules = KeptValues()
    outputs: list[Any] = []
    last = model.get_submodule(f"{parts.layers}.{parts.num_layers - 1}")
    hook = last.register_forward_hook(lambda _layer, _arguments, output: outputs.append(output))
    name = cache_argument_of(model)
    cache = DynamicCache(config=model.config) if name and supports_cache(type(model)) else None
    arguments: dict[str, Any] = {} if name is None else {name: cache, "use_cache": True}
    try:
        with (
            torch.no_grad(),
            torch.device("meta"),
            unchecked_distributions(),
            NoData(),
            ModuleState(model, model.config.model_type).lent_to(modules, is_first=True),
        ):
            ids = torch.zeros((1, num_tokens), dtype=torch.int64, device="meta")
            result, output = HeadPass(model, parts.head).run(is_last=True, input_ids=ids, **arguments)
    except Exception as error:
        raise UncuttableModelError(
            type(model).__name__, f"a forward pass without weights failed ({type(error).__name__}: {error})"
        ) from error
    finally:
        hook.remove()
    assert output is not None
    return result.get(name) if cache is None and name else cache, modules, outputs[-1], output

"""Checks a KV cache of transformers that a user passes as ``past_key_values``, and turns it into a handle.

Knows transformers' kinds of caches and layers; opens no session itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import (
    DummyLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.sharded.calling.cache import ShardedCache, ShardedDynamicCache, ShardedStaticCache, layer_lengths

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline

_MOST_TOKENS = 2**63 - 1  # per row, as torch counts

GivenCache = ShardedCache | DynamicCache | StaticCache
"""A handle, or an empty KV cache of transformers."""


def check_empty(given: object, config: PreTrainedConfig) -> DynamicCache | StaticCache:
    """Check that a KV cache of transformers is empty and of the model's own kind, and return it."""
    kind = type(given).__name__
    if type(given) is not DynamicCache and type(given) is not StaticCache:
        raise UnsupportedOperationError(
            f"past_key_values is a {kind}: a sharded model keeps its KV in the workers; "
            "pass None or an empty DynamicCache or StaticCache, then what the model returned"
        )
    if given.offloading:
        raise UnsupportedOperationError(
            f"past_key_values is an offloading {kind}: the KV stays in the workers; leave it out"
        )
    if any(_holds_something(layer) for layer in given.layers):
        raise UnsupportedOperationError(
            f"past_key_values is a {kind} that already holds KV, or room for it, which can't be sent to the workers: "
            "pass an empty one and run the text again"
        )
    if isinstance(given, StaticCache):
        _check_static(given, config)
        return given
    own = _kinds(DynamicCache(config=config))
    if (given.layers and _kinds(given) != own) or (not given.layers and any(window for _, window in own)):
        raise UnsupportedOperationError(
            f"past_key_values is a {kind} whose layers differ from the model's, so it would keep other KV: "
            "make it with DynamicCache(config=model.config)"
        )
    return given


def adopt(given: GivenCache, pipeline: Pipeline, sliding_window: int | None, sizes: Sequence[int] = ()) -> ShardedCache:
    """Return the handle of a session; turn an empty KV cache of transformers, checked, into that of a new one, in place.

    A new one has microbatches of ``sizes`` rows, if there are several.
    """
    if isinstance(given, ShardedCache):
        return given
    if isinstance(given, StaticCache):
        return ShardedStaticCache.adopt(given, pipeline, sizes)
    return ShardedDynamicCache.adopt(given, pipeline, sliding_window, sizes)


def max_cache_len_of(given: GivenCache) -> int:
    """Return how many tokens per row a static KV cache holds; 0: it grows."""
    if isinstance(given, ShardedCache):
        return given.session.max_cache_len
    return max(layer_lengths(given)) if isinstance(given, StaticCache) else 0


def _check_static(given: StaticCache, config: PreTrainedConfig) -> None:
    other = next((each for each in given.layers if type(each) not in (StaticLayer, StaticSlidingWindowLayer)), None)
    if other is not None:
        raise UnsupportedOperationError(
            f"a static KV cache of a model whose layers keep a {type(other).__name__} is not possible here: leave cache_implementation out"
        )
    try:
        lengths = layer_lengths(given)
    except TypeError:
        lengths = (0,)
    if not 1 <= min(lengths) <= max(lengths) <= _MOST_TOKENS:
        length = given.get_max_length()
        raise ArgumentError(f"max_cache_len={length!r} of past_key_values must be an integer from 1 to {_MOST_TOKENS}")
    own = StaticCache(config=config, max_cache_len=max(lengths))
    if list(map(type, given.layers)) != list(map(type, own.layers)) or lengths != layer_lengths(own):
        raise UnsupportedOperationError(
            "past_key_values is a StaticCache whose layers differ from the model's, so it would keep other KV: "
            "make it with StaticCache(config=model.config, max_cache_len=...)"
        )


def _holds_something(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return any(layer.has_previous_state.values())
    return not isinstance(layer, DummyLayer) and bool(getattr(layer, "is_initialized", False))


def _kinds(cache: DynamicCache) -> list[tuple[type, int | None]]:
    return [(type(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]

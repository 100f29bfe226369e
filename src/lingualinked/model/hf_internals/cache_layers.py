"""The layers of transformers' KV caches as bases of other ones.

Knows what transformers registers by itself; no KV.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer


class CacheLayer(DynamicLayer):
    """Base of full-attention KV layers; unlike transformers' own, subclasses do not register as default layer types."""

    _layer_type: Any = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


class SlidingCacheLayer(DynamicSlidingWindowLayer):
    """Base of sliding-window KV layers, as `CacheLayer`."""

    _layer_type: Any = None

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)


class StaticCacheLayer(StaticLayer):
    """Base of full-attention KV layers of a fixed size, as `CacheLayer`."""

    _layer_type: Any = None

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)


class StaticSlidingCacheLayer(StaticSlidingWindowLayer):
    """Base of sliding-window KV layers of a fixed size, as `CacheLayer`."""

    _layer_type: Any = None

    def __init__(self, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len, sliding_window)


_made: dict[tuple[type, type], Any] = {}


def subclass_of(first: type, cls: type) -> Any:
    """Return a subclass of two classes, the second of transformers' layers, that does not register, as `CacheLayer`."""
    if (first, cls) not in _made:
        _made[first, cls] = type(cls.__name__, (first, cls), {"_layer_type": None})
    return _made[first, cls]

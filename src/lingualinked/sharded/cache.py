"""``past_key_values`` of a sharded model: a handle on the KV cache in the workers.

Knows transformers' cache interface and one session; holds no keys and no values.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from lingualinked.errors import ArgumentError, ClosedError, UnsupportedOperationError
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline

_ANEW = "start again with past_key_values=None"


class ShardedCache(DynamicCache):
    """The KV cache of one session, with the interface that transformers' generation code uses.

    A sharded model returns it as ``past_key_values`` and accepts it in the next call. ``copy.deepcopy`` makes a new
    session with a copy of the KV in every stage. The KV is freed in every stage by `end`, or when the handle is no
    longer referenced.
    """

    def __init__(self, pipeline: Pipeline, sliding_window: int | None = None) -> None:
        # Not DynamicCache.__init__, which would make layers.
        self.session = pipeline.open_session()
        self._pipeline = weakref.ref(pipeline)  # so that a handle does not keep the model loaded
        self._num_layers = pipeline.plan.stages[-1].end
        self._sliding_window = sliding_window
        self._records_past = False
        self._is_user_defined = False

    @classmethod
    def adopt(cls, empty: DynamicCache, pipeline: Pipeline, sliding_window: int | None) -> ShardedCache:
        """Turn an empty KV cache of transformers, checked by `check_empty`, into the handle of a new session, in place."""
        records_past = any(getattr(layer, "record_past", False) for layer in empty.layers)
        cache = cast("ShardedCache", empty)
        vars(cache).clear()
        cache.__class__ = cls
        ShardedCache.__init__(cache, pipeline, sliding_window)
        if records_past:
            cache.activate_past_recording()
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedCache:
        """Copy the KV in every stage into a new session, to continue the text in two ways."""
        copied = type(self)(self._open_pipeline(), self._sliding_window)
        self.session.copy_to(copied.session)
        copied._records_past, copied._is_user_defined = self._records_past, self._is_user_defined  # noqa: SLF001 - its own
        memo[id(self)] = copied
        return copied

    def _open_pipeline(self) -> Pipeline:
        pipeline = self._pipeline()
        if pipeline is None:
            raise ClosedError("the model of these past_key_values is closed: load it again with from_pretrained")
        pipeline.check_open()
        return pipeline

    def check(self, pipeline: Pipeline, num_rows: int) -> None:
        """Raise ArgumentError unless the next step of a model can continue this cache."""
        if self._pipeline() is not pipeline:
            raise ArgumentError(f"past_key_values belong to another model: {_ANEW}")
        if self.is_initialized and num_rows != self.session.num_rows:
            raise ArgumentError(
                f"past_key_values hold the KV of {count_text(self.session.num_rows, 'row')}, and this step has {num_rows:,}: "
                "pass the same number of rows, or use batch_repeat_interleave or batch_select_indices of past_key_values"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - equal for all layers
        """Return the number of tokens whose KV is held."""
        return self.session.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Return -1: the KV has no maximal length."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` (int64 ``[rows]``), for beam search."""
        self._select(f"reorder_cache({_text(beam_idx)})", lambda rows: rows.index_select(0, beam_idx.cpu()))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, as transformers' caches do.

        Once a sliding window is full, this needs the tokens before it (`activate_past_recording`).
        """
        held = self.session.num_tokens
        try:
            num_removed = -operator.index(tokens_to_remove)
        except TypeError:
            raise ArgumentError(f"crop({_text(tokens_to_remove)}): pass minus the number of tokens to remove") from None
        if not 0 <= num_removed <= held:
            raise ArgumentError(
                f"crop({-num_removed}) of {count_text(held, 'token')}: pass minus the number of tokens to remove"
            )
        if self._sliding_window is not None and held >= self._sliding_window and not self._records_past:
            raise ArgumentError(
                f"crop({-num_removed}) of {count_text(held, 'token')}: the sliding window "
                f"({count_text(self._sliding_window, 'token')}) is full; "
                "call activate_past_recording() before the first step"
            )
        if self.is_initialized:
            self.session.crop(num_removed)

    def activate_past_recording(self) -> None:
        """Make sliding layers keep what `crop` needs, from the next step on."""
        self._records_past = True
        self.session.record_past(True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._select(f"batch_repeat_interleave({_text(repeats)})", lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int64, or a mask)."""
        chosen = indices.cpu() if isinstance(indices, Tensor) else indices
        self._select(f"batch_select_indices({_text(indices)})", lambda rows: rows[chosen, ...])

    def _select(self, call: str, pick: Callable[[Tensor], Tensor]) -> None:
        """Keep the rows that ``pick`` selects from the row numbers, once it is known that it can select them."""
        num_rows = self.session.num_rows
        if not self.session.num_tokens:
            return  # as transformers does while the cache is empty
        try:
            rows = pick(torch.arange(num_rows))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ArgumentError(f"{call} of {count_text(num_rows, 'row')}: {error}") from error
        if rows.ndim != 1 or not len(rows):
            raise ArgumentError(
                f"{call} of {count_text(num_rows, 'row')} leaves no rows: select at least one, with indices of one dimension"
            )
        self.session.reorder(rows)

    def reset(self) -> None:
        """Free the KV in every stage, and start a new session."""
        pipeline = self._open_pipeline()
        self.session.end()
        self.session = pipeline.open_session()
        if self._records_past:
            self.session.record_past(True)

    def end(self) -> None:
        """Free the KV in every stage; the handle can no longer be used."""
        self.session.end()

    @property
    def batch_size(self) -> int:
        """Rows whose KV is held; -1 before the first step."""
        return self.session.num_rows or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a step has been run."""
        return self.session.num_rows > 0

    @property
    def is_compileable(self) -> bool:
        """Whether its shapes are static: no."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works: yes."""
        return True

    def __len__(self) -> int:
        """Return the number of the model's layers."""
        return self._num_layers

    def __repr__(self) -> str:
        rows, tokens = count_text(self.session.num_rows, "row"), count_text(self.session.num_tokens, "token")
        state = "ended" if self.session.ended else f"{rows} x {tokens}"
        return f"<ShardedCache: {state}>"

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """Refuse: the layers of the cache are in the workers."""
        raise UnsupportedOperationError(
            "layers of a sharded KV cache: keys and values are in the workers and can't be read or written here"
        )

    def update(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: only the stages write KV."""
        raise UnsupportedOperationError("update() of a sharded KV cache: only the workers write KV")

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(
            "the KV cache of a sharded model can't be pickled, because it lies in the workers: "
            "run the text again, or use copy.deepcopy, which copies it there"
        )


def check_empty(given: object, config: PreTrainedConfig) -> DynamicCache:
    """Check that a KV cache of transformers is empty and of the model's own kind, and return it."""
    kind = type(given).__name__
    if type(given) is not DynamicCache:
        raise UnsupportedOperationError(
            f"past_key_values is a {kind}: a sharded model keeps its KV in the workers; "
            "pass None or an empty DynamicCache, then what the model returned"
        )
    if given.offloading:
        raise UnsupportedOperationError(
            f"past_key_values is an offloading {kind}: the KV stays in the workers; leave it out"
        )
    if any(getattr(layer, "is_initialized", False) for layer in given.layers):
        raise UnsupportedOperationError(
            f"past_key_values is a {kind} that already holds KV, which can't be sent to the workers: "
            "pass an empty one and run the text again"
        )
    own = _kinds(DynamicCache(config=config))
    if (given.layers and _kinds(given) != own) or (not given.layers and any(window for _, window in own)):
        raise UnsupportedOperationError(
            f"past_key_values is a {kind} whose layers differ from the model's, so it would keep other KV: "
            "make it with DynamicCache(config=model.config)"
        )
    return given


def _kinds(cache: DynamicCache) -> list[tuple[type, int | None]]:
    return [(type(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]


def _text(value: object) -> str:
    return str(value.tolist()) if isinstance(value, Tensor) else repr(value)

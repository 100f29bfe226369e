"""``past_key_values`` of a sharded model: a handle on the KV cache in the workers.

Knows transformers' cache interface and one session; holds no keys and no values.
"""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lingualinked.cluster.sessions.any_session import AnySession
from lingualinked.cluster.sessions.session import Session
from lingualinked.errors import ArgumentError, ClosedError, UnsupportedOperationError
from lingualinked.model.cutting.architectures import find_class, read_config
from lingualinked.model.hf_internals.cache_arguments import keeps_cache
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.spec import ModelSpec

_ANEW = "start again with past_key_values=None"


class ShardedCache(Cache):
    """The KV cache of one session, with the interface that transformers' generation code uses.

    A sharded model returns it as ``past_key_values`` and accepts it in the next call. ``copy.deepcopy`` makes a new
    session with a copy of the KV in every stage. The KV is freed in every stage by `end`, or when the handle is no
    longer referenced.
    """

    _is_user_defined = False  # transformers sets it

    def __init__(self, pipeline: Pipeline, max_cache_len: int = 0, sizes: Sequence[int] = ()) -> None:
        # Not Cache.__init__, which would make layers.
        self.session: AnySession = pipeline.open_batch(sizes, max_cache_len)
        self._pipeline = weakref.ref(pipeline)  # so that a handle does not keep the model loaded
        self.source_mask: Tensor | None = None  # of what an encoder has read, as the stages know it
        self._num_layers = pipeline.plan.stages[-1].end

    @classmethod
    def _adopt(cls, empty: Cache) -> Self:
        """Turn an empty KV cache of transformers into a handle, still without a session, in place."""
        kept = {name: value for name, value in vars(empty).items() if name == "_is_user_defined"}
        vars(empty).clear()
        vars(empty).update(kept)
        empty.__class__ = cls
        return cast("Self", empty)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the KV in every stage into a new session, to continue the text in two ways."""
        copied = self.__new__(type(self))
        vars(copied).update(vars(self), session=self._open_pipeline().open_session_like(self.session))
        self.session.copy_to(cast("Any", copied.session))
        memo[id(self)] = copied
        return copied

    def _open_pipeline(self) -> Pipeline:
        pipeline = self._pipeline()
        if pipeline is None:
            raise ClosedError("the model of these past_key_values is closed: load it again with from_pretrained")
        pipeline.check_open()
        return pipeline

    def _check_between_steps(self, call: str) -> None:
        """Refuse to be read or changed by a hook of a step of this text, which some layers have seen already and others not."""
        if self.session.stepping_thread == threading.get_ident():
            raise UnsupportedOperationError(
                f"{call} of past_key_values inside a hook: its step runs in the workers at the moment; call it before or after the "
                "step, and take numbers of tokens from the shapes of what the hook is given"
            )

    def check(self, pipeline: Pipeline, num_rows: int) -> None:
        """Raise ArgumentError unless the next step of a model can continue this cache."""
        if self._pipeline() is not pipeline:
            raise ArgumentError(f"past_key_values belong to another model: {_ANEW}")
        if self.is_initialized and num_rows != self.session.num_rows:
            raise ArgumentError(
                f"past_key_values hold the KV of {count_text(self.session.num_rows, 'row')}, and this step has {num_rows:,}: "
                "pass the same number of rows, or use batch_repeat_interleave or batch_select_indices of past_key_values"
            )

    def check_room(self, num_new: int) -> None:
        """Raise ArgumentError if there is no room for so many more tokens per row."""

    def activate_past_recording(self) -> None:
        """Make sliding layers keep what `crop` needs, from the next step on, if there are any that can."""

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - equal for all layers
        """Return the number of tokens whose KV is held."""
        self._check_between_steps("get_seq_length()")
        return self.session.num_tokens

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: ARG002
        """Return whether a step has been run."""
        return self.is_initialized

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` (int64 ``[rows]``), for beam search."""
        self._select(f"reorder_cache({_text(beam_idx)})", lambda rows: rows.index_select(0, beam_idx.cpu()))

    def _select(self, call: str, pick: Callable[[Tensor], Tensor]) -> None:
        """Keep the rows that ``pick`` selects from the row numbers, once it is known that it can select them."""
        self._check_between_steps(call)
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
        self._check_between_steps("reset()")
        pipeline = self._open_pipeline()
        self.session.end()
        self.session = pipeline.open_session_like(self.session)

    def end(self) -> None:
        """Free the KV in every stage; the handle can no longer be used."""
        self.session.end()

    @property
    def made_before_edit(self) -> bool:
        """Whether KV is held that was made, at least in part, before the model's weights or layers were changed."""
        return self.is_initialized and self.session.kv_age.is_before_edit

    @property
    def num_microbatches(self) -> int:
        """Microbatches that its rows run as, which follow each other through the stages."""
        return 1 if isinstance(self.session, Session) else self.session.num_microbatches

    def split_before_step(self, sizes: Sequence[int]) -> None:
        """Make fewer microbatches of rows that none has, yet."""
        if sizes and not self.is_initialized and not isinstance(self.session, Session):
            self.session.drop_microbatches(sizes)

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
        """Whether transformers may compile the model, and make masks, for it: no."""
        return False

    def __len__(self) -> int:
        """Return the number of the model's layers."""
        return self._num_layers

    def __repr__(self) -> str:
        rows, tokens = count_text(self.session.num_rows, "row"), count_text(self.session.num_tokens, "token")
        state = "ended" if self.session.ended else f"{rows} x {tokens}"
        return f"<{type(self).__name__}: {state}>"

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """Refuse: the layers of the cache are in the workers."""
        raise UnsupportedOperationError(
            "layers of a sharded KV cache: keys and values are in the workers and can't be read or written here"
        )

    def update(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: only the stages write KV."""
        raise UnsupportedOperationError(
            "update() of a sharded KV cache: only the workers write KV; to run attention in this process, as nnsight's source "
            "does, call the model with use_cache=False"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(
            "the KV cache of a sharded model can't be pickled, because it lies in the workers: "
            "run the text again, or use copy.deepcopy, which copies it there"
        )


@functools.lru_cache(maxsize=32)
def keeps_states(spec: ModelSpec) -> bool:
    """Return whether layers of a model keep a state of the whole text, and not only KV of its tokens."""
    if not keeps_cache(find_class(spec)):
        return True
    layers = DynamicCache(config=read_config(spec)).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


class ShardedDynamicCache(ShardedCache, DynamicCache):
    """The handle of a KV cache that grows with the text."""

    def __init__(self, pipeline: Pipeline, sliding_window: int | None = None, sizes: Sequence[int] = ()) -> None:
        super().__init__(pipeline, sizes=sizes)
        self._sliding_window = sliding_window
        self._records_past = False

    @classmethod
    def adopt(
        cls, empty: DynamicCache, pipeline: Pipeline, sliding_window: int | None, sizes: Sequence[int] = ()
    ) -> Self:
        """Turn an empty KV cache of transformers, checked by `check_empty`, into the handle of a new session, in place."""
        records_past = any(getattr(layer, "record_past", False) for layer in empty.layers)
        cache = cls._adopt(empty)
        cls.__init__(cache, pipeline, sliding_window, sizes)
        if records_past:
            cache.activate_past_recording()
        return cache

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Return -1: the KV has no maximal length."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, as transformers' caches do.

        Once a sliding window is full, this needs the tokens before it (`activate_past_recording`).
        """
        self._check_between_steps(f"crop({_text(tokens_to_remove)})")
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
        if held and not self._records_past and not self.is_croppable:
            raise ArgumentError(
                f"crop({-num_removed}) of {count_text(held, 'token')}: layers keep a state that does not go back; run the text again"
            )
        if self.is_initialized:
            self.session.crop(num_removed)

    def activate_past_recording(self) -> None:
        """Make sliding layers keep what `crop` needs, from the next step on."""
        self._check_between_steps("activate_past_recording()")
        self._records_past = True
        self.session.record_past(True)

    def reset(self) -> None:
        """Free the KV in every stage, and start a new session."""
        super().reset()
        if self._records_past:
            self.session.record_past(True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._select(f"batch_repeat_interleave({_text(repeats)})", lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int64, or a mask)."""
        chosen = indices.cpu() if isinstance(indices, Tensor) else indices
        self._select(f"batch_select_indices({_text(indices)})", lambda rows: rows[chosen, ...])

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` puts everything back as it was: unless layers keep a state that does not go back."""
        return not keeps_states(self._open_pipeline().spec)

    @property
    def can_crop(self) -> bool:
        """Whether `crop` works at any length: unless layers forget what leaves their window, or keep a state."""
        return self.is_croppable and (self._sliding_window is None or self._records_past)


class ShardedStaticCache(ShardedCache, StaticCache):
    """The handle of a KV cache that has room for so many tokens from its first step on."""

    def __init__(
        self, pipeline: Pipeline, max_lengths: tuple[int, ...], sizes: Sequence[int] = (), *, is_bounded: bool
    ) -> None:
        super().__init__(pipeline, max(max_lengths), sizes)
        self._max_lengths = max_lengths  # by layer
        self._is_bounded = is_bounded  # not if all layers keep a sliding window only

    @classmethod
    def adopt(cls, empty: StaticCache, pipeline: Pipeline, sizes: Sequence[int] = ()) -> Self:
        """Turn an empty KV cache of transformers, checked by `check_empty`, into the handle of a new session, in place."""
        max_lengths, is_bounded = layer_lengths(empty), not all(empty.is_sliding)
        cache = cls._adopt(empty)
        cls.__init__(cache, pipeline, max_lengths, sizes, is_bounded=is_bounded)
        return cache

    def check_room(self, num_new: int) -> None:
        """Raise ArgumentError if there is no room for so many more tokens per row."""
        held, most = self.session.num_tokens, self.session.max_cache_len
        if self._is_bounded and held + num_new > most:
            raise ArgumentError(
                f"a step of {count_text(num_new, 'token')} per row after {held:,} exceeds max_cache_len={most} of "
                "past_key_values: make a longer StaticCache, or generate fewer tokens"
            )

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return how many tokens per row a layer holds, or the layer that holds most."""
        if layer_idx is None:
            return max(self._max_lengths)
        return self._max_lengths[layer_idx] if layer_idx < len(self._max_lengths) else -1

    def activate_past_recording(self) -> None:
        """Do nothing, as for transformers' static KV cache: it can't be cropped."""

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse, as transformers' static layers do."""
        self._refuse(f"crop({_text(tokens_to_remove)})")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refuse, as transformers' static layers do."""
        self._refuse(f"batch_repeat_interleave({_text(repeats)})")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Refuse, as transformers' static layers do."""
        self._refuse(f"batch_select_indices({_text(indices)})")

    def _refuse(self, call: str) -> NoReturn:
        raise UnsupportedOperationError(
            f"{call} of a static KV cache: its layers have no such method in transformers either; use a DynamicCache"
        )

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works: no."""
        return False


def layer_lengths(cache: StaticCache) -> tuple[int, ...]:
    """Return how many tokens per row each layer of an empty KV cache is to hold."""
    return tuple(operator.index(layer.get_max_length()) for layer in cache.layers)


def _text(value: object) -> str:
    return str(value.tolist()) if isinstance(value, Tensor) else repr(value)

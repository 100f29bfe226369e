"""Adapts transformers' ``generate`` to a sharded model: it opens a session instead of a cache, and refuses what needs layers here.

Knows generation configs and sessions; the decoding loops, processors and criteria are transformers' own.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.interrupts import interruptible
from lingualinked.sharded.adapters.model_adapters import row_adapters
from lingualinked.sharded.cache import ShardedCache, ShardedDynamicCache, ShardedStaticCache
from lingualinked.sharded.given_cache import GivenCache, adopt, check_empty
from lingualinked.sharded.inputs import check_prompt

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline

# The model that generates in this context, and the sessions that it has opened; None outside of `generate`.
_call: contextvars.ContextVar[tuple[object, list[ShardedCache]] | None] = contextvars.ContextVar("call", default=None)

# Settings of a GenerationConfig that are not supported here, and why.
_CACHES = (None, "dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked")  # the last three are static too
_REFUSED = {
    "assistant_early_exit": "the head is on the last stage, so the first layers alone give no tokens",
    "compile_config": "the layers run uncompiled in the workers",
    "dola_layers": "it compares hidden states, which stay in the workers",
    "speculation_type": "its draft model reads the embeddings, which are in a worker",
    "use_mtp": "its draft layers read hidden states, which stay in the workers",
}


class ShardedGeneration:
    """Mixin that overrides parts of transformers' ``GenerationMixin``; comes before it in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        config: Any
        _pipeline: Pipeline

        def _check_unchanged(self) -> None: ...

    @interruptible
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate token ids with transformers' own ``generate``, while the layers run in the workers.

        Takes the arguments of ``transformers.GenerationMixin.generate``, and ``adapter_names``, one for each row of the prompt
        ("__base__" for none), in place of the active adapters. When the call ends, normally or not, the KV of
        its sessions is freed in every stage; only a returned ``past_key_values`` keeps its session.

        Raises
        ------
        UnsupportedOperationError
            If an argument asks for something that a sharded model does not support.
        ArgumentError
            If an argument is unknown, or ids are empty, outside the vocabulary, or exceed the learned positions or the length
            of a static KV cache.
        WorkerDiedError, WorkerError, StepTimeoutError, ClosedError
            If a step can't be run, or the model is closed.
        """
        # 1) refuse what can't work before transformers computes anything
        self._pipeline.check_open()
        self._check_unchanged()
        if kwargs.get("cache_implementation") == "paged":
            _refuse_setting("cache_implementation", "paged", "continuous batching is not supported yet")
        check_prompt(args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), kwargs)
        # 2) run transformers' loop, which calls `forward` for each step
        with _generating(self, kwargs.pop("adapter_names", None)) as opened:
            result = super().generate(*args, **kwargs)  # type: ignore[misc]
            # 3) keep the session that the caller gets with the result; the others end here
            opened[:] = [cache for cache in opened if not _may_hold(result, cache)]
            return result

    def prepare_inputs_for_generation(self, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments for ``forward``, without those that only ``generate`` uses."""
        only_for_generate = ("assistant_model", "assistant_tokenizer", "streamer", "tokenizer")
        arguments = {name: value for name, value in kwargs.items() if name not in only_for_generate}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(**arguments)  # type: ignore[misc]
        past, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        make_mask = getattr(self, "create_masks_for_generate", None)  # Bloom's is as wide as a static KV cache
        if isinstance(past, ShardedStaticCache) and mask is not None and make_mask is not None:
            arguments = {"attention_mask": mask, "past_key_values": past}
            inputs["attention_mask"] = make_mask(config=self.config, inputs_embeds=None, **arguments)
        return inputs

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Refuse unsupported settings, once transformers has merged those of all sources."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        for name, reason in _REFUSED.items():
            value = getattr(config, name)
            if value is not None and value is not False:
                _refuse_setting(name, value, reason)
        if config.cache_implementation not in _CACHES:
            _refuse_setting("cache_implementation", config.cache_implementation, "the KV stays where the layers are")
        return config, model_kwargs

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """Refuse a manager of continuous batching, which calls this without arguments before it runs layers itself."""
        if not args and not kwargs:
            raise UnsupportedOperationError(
                "continuous batching of a sharded model is not supported yet; call generate with a padded batch"
            )
        return super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        try:
            super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        except ValueError as error:
            raise ArgumentError(f"unknown argument of generate: {error}") from error

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Open a session where transformers would make a cache, and reserve room for the maximal number of tokens."""
        given = model_kwargs.get("past_key_values")
        is_static = generation_config.cache_implementation not in (None, "dynamic")
        if generation_mode == GenerationMode.ASSISTED_GENERATION and (is_static or isinstance(given, StaticCache)):
            raise UnsupportedOperationError(
                "assisted decoding with a static KV cache, which can't be cropped: leave cache_implementation out, or pass a "
                "DynamicCache"
            )
        if given is not None and not isinstance(given, ShardedCache | tuple):
            check_empty(given, self.config)
        if given is not None or generation_config.use_cache is False or is_static:
            own = super()._prepare_cache_for_generation  # type: ignore[misc]
            own(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        else:
            model_kwargs["past_key_values"] = self._open_session()
        past = model_kwargs.get("past_key_values")
        if past is None:
            return
        cache = self._as_session(past)
        cache.session.reserve(max_cache_length)
        if given is not None:
            return
        if generation_config.is_assistant:
            cache.activate_past_recording()
        call = _call.get()
        if call is not None:
            call[1].append(cache)

    def _prepare_static_cache(
        self,
        cache_implementation: str,
        batch_size: int,
        max_cache_len: int,
        prefill_chunk_size: int | None,  # noqa: ARG002 - with one, transformers would make room for KV in this process
        model_kwargs: dict[str, Any],
    ) -> ShardedCache:
        """Open a session whose static KV cache is as long as transformers would make it."""
        own = super()._prepare_static_cache  # type: ignore[misc]
        empty = own(cache_implementation, batch_size, max_cache_len, None, model_kwargs)
        return self._as_session(check_empty(empty, self.config))

    def _checked_in_call(self) -> bool:
        """Whether a `generate` of this model is running, which has checked the model for all its steps."""
        call = _call.get()
        return call is not None and call[0] is self

    def _as_session(self, past: GivenCache) -> ShardedCache:
        """Return the handle of a session; turn an empty KV cache into that of a new one."""
        return adopt(past, self._pipeline, self._sliding_window)

    def _open_session(self) -> ShardedCache:
        return ShardedDynamicCache(self._pipeline, self._sliding_window)

    @functools.cached_property
    def _sliding_window(self) -> int | None:
        """Tokens that the narrowest sliding layer sees; ``None`` if there is no sliding layer."""
        layers: list[Any] = DynamicCache(config=self.config).layers
        return min((layer.sliding_window for layer in layers if layer.is_sliding), default=None)


def _refuse_setting(name: str, value: object, reason: str) -> NoReturn:
    raise UnsupportedOperationError(f"{name}={value!r} is not supported by a sharded model: {reason}; leave it out")


@contextlib.contextmanager
def _generating(model: object, rows: Sequence[str] | None) -> Iterator[list[ShardedCache]]:
    """Record that a model, which has been checked, generates; at the end, end the sessions left in the list.

    `rows` are the adapters of the rows, if the call names them.
    """
    opened: list[ShardedCache] = []
    token, row_token = _call.set((model, opened)), row_adapters.set((model, rows))
    try:
        yield opened
    finally:
        _call.reset(token)
        row_adapters.reset(row_token)
        for cache in opened:
            cache.end()


def _may_hold(result: object, cache: ShardedCache) -> bool:
    """Return whether the result of a call may hold a session."""
    if isinstance(result, ModelOutput):
        return cache is result.get("past_key_values")
    return not isinstance(result, Tensor)  # a user's own decoding loop may return anything

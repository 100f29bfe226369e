"""Adapts transformers' ``generate`` to a sharded model: it opens a session instead of a cache, and refuses what needs layers here.

Knows generation configs and sessions; the decoding loops, processors and criteria are transformers' own.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.interrupts import interruptible
from lingualinked.model.hf_internals.cache_arguments import keeps_cache
from lingualinked.model.hf_internals.encoding import ENCODED, holds_pictures
from lingualinked.sharded.adapters.model_adapters import row_adapters
from lingualinked.sharded.batching.batched_generation import BatchedGeneration
from lingualinked.sharded.calling.cache import ShardedCache, ShardedDynamicCache, ShardedStaticCache
from lingualinked.sharded.calling.given_cache import GivenCache, check_empty
from lingualinked.sharded.calling.inputs import check_prompt
from lingualinked.sharded.generating.microbatching import Batch, check_num_microbatches
from lingualinked.sharded.generating.prefill import check_chunk_size
from lingualinked.sharded.generating.random_loans import drawing_here
from lingualinked.sharded.generating.token_loop import LoopArguments, TokenLoop

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.sharded.calling.pictures import FurtherArguments


@dataclasses.dataclass(slots=True)
class _Call:
    """A call of `generate`: of which model, the sessions that it has opened, and how its rows are split."""

    model: object
    num_microbatches: int | None  # that the user asks for
    opened: list[ShardedCache] = dataclasses.field(default_factory=list)
    sizes: tuple[int, ...] = ()  # of microbatches
    lockstep_sizes: tuple[int, ...] = ()  # of those that are best if each step waits for all; no more of them


_call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("call", default=None)

# Settings of a GenerationConfig that are not supported here, and why.
_CACHES = (None, "dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked")  # the last three are static too
_REFUSED = {
    "assistant_early_exit": "the head is on the last stage, so the first layers alone give no tokens",
    "compile_config": "the layers run uncompiled in the workers",
    "dola_layers": "it compares hidden states, which stay in the workers",
    "speculation_type": "its draft model reads the embeddings, which are in a worker",
    "use_mtp": "its draft layers read hidden states, which stay in the workers",
}


class ShardedGeneration(BatchedGeneration):
    """Mixin that overrides parts of transformers' ``GenerationMixin``; comes before it in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        config: Any
        _cache_name: str | None
        _further: FurtherArguments
        _pipeline: Pipeline

        def _check_unchanged(self) -> None: ...

        def _as_session(self, past: GivenCache, sizes: Sequence[int] = ()) -> ShardedCache: ...

        @property
        def _sliding_window(self) -> int | None: ...

    @interruptible
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate token ids with transformers' own ``generate``, while the layers run in the workers.

        Takes the arguments of ``transformers.GenerationMixin.generate``, and ``adapter_names``, one for each row of the prompt
        ("__base__" for none), in place of the active adapters. Several rows run as microbatches, which follow each other
        through the stages, where that is predicted to be faster and changes no bit; or as ``num_microbatches`` of them, as even
        as can be, with the beams of a prompt in one. When the call ends, normally or not, the KV of
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
            return self._generate_paged(*args, **kwargs)
        check_prompt(args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), kwargs)
        # 2) run transformers' loop, which calls `forward` for each step
        call = _Call(self, check_num_microbatches(kwargs.pop("num_microbatches", None)))
        with _generating(call, kwargs.pop("adapter_names", None)):
            result = super().generate(*args, **kwargs)  # type: ignore[misc]
            # 3) keep the session that the caller gets with the result; the others end here
            call.opened[:] = [cache for cache in call.opened if not _may_hold(result, cache)]
            return result

    def prepare_inputs_for_generation(self, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments for ``forward``, without those that only ``generate`` uses."""
        only_for_generate = ("assistant_model", "assistant_tokenizer", "streamer", "tokenizer")
        arguments = {name: value for name, value in kwargs.items() if name not in only_for_generate}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(**arguments)  # type: ignore[misc]
        for name in ("is_first_iteration", "next_sequence_length"):  # a class without KV passes them on
            inputs.pop(name, None)
        past, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        make_mask = getattr(self, "create_masks_for_generate", None)  # Bloom's is as wide as a static KV cache
        sees_pictures = bool(self._further.names)  # stages make masks that depend on them
        if isinstance(past, ShardedStaticCache) and mask is not None and make_mask is not None and not sees_pictures:
            arguments = {"attention_mask": mask, "past_key_values": past}
            inputs["attention_mask"] = make_mask(config=self.config, inputs_embeds=None, **arguments)
        return inputs

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Refuse unsupported settings, once transformers has merged those of all sources."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        check_chunk_size(config.prefill_chunk_size)
        if config.prefill_chunk_size is not None and self._pipeline.spec.batch_invariant:
            reason = "with batch_invariant=True, chunks would begin where other rows' padding lets them"
            _refuse_setting("prefill_chunk_size", config.prefill_chunk_size, reason)
        for name, reason in _REFUSED.items():
            value = getattr(config, name)
            if value is not None and value is not False:
                _refuse_setting(name, value, reason)
        if config.cache_implementation not in _CACHES:
            _refuse_setting("cache_implementation", config.cache_implementation, "the KV stays where the layers are")
        return config, model_kwargs

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode greedily or sample: the stages choose the tokens where they can, else transformers' loop does it here."""
        given = LoopArguments(
            input_ids=input_ids,
            processors=logits_processor,
            criteria=stopping_criteria,
            config=generation_config,
            streamer=streamer,
            model_kwargs=model_kwargs,
        )
        loop = None if synced_gpus else TokenLoop.of(self, given)
        if loop is not None:
            return loop.run()
        cache = model_kwargs.get(self._cache_name or "")
        if isinstance(cache, ShardedCache):
            cache.split_before_step(self._lockstep_sizes())
        options = {"synced_gpus": synced_gpus, "streamer": streamer}
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        with drawing_here() if generation_config.do_sample else contextlib.nullcontext():
            return super()._sample(*arguments, **options, **model_kwargs)  # type: ignore[misc]

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
        name = self._cache_name or ""
        given = model_kwargs.get(name)
        is_static = generation_config.cache_implementation not in (None, "dynamic")
        if generation_mode == GenerationMode.ASSISTED_GENERATION and (is_static or isinstance(given, StaticCache)):
            raise UnsupportedOperationError(
                "assisted decoding with a static KV cache, which can't be cropped: leave cache_implementation out, or pass a "
                "DynamicCache"
            )
        if given is not None and not isinstance(given, ShardedCache | tuple):
            check_empty(given, self.config)
        sizes = self._choose_sizes(generation_config, model_kwargs, batch_size)
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            sizes = self._lockstep_sizes()
        if not name:  # each step runs the whole text
            return
        makes_own = not keeps_cache(type(self))  # the first step opens the session
        if given is not None or generation_config.use_cache is False or is_static or makes_own:
            own = super()._prepare_cache_for_generation  # type: ignore[misc]
            own(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        else:
            model_kwargs[name] = self._open_session(sizes)
        past = model_kwargs.get(name)
        if past is None:
            return
        cache = self._as_session(past, sizes)
        cache.session.reserve(max_cache_length)
        if given is not None:
            return
        if generation_config.is_assistant:
            cache.activate_past_recording()
        call = _call.get()
        if call is not None:
            call.opened.append(cache)

    def _prepare_static_cache(
        self,
        cache_implementation: str,
        batch_size: int,
        max_cache_len: int,
        prefill_chunk_size: int | None,  # noqa: ARG002 - with one, transformers would make room for KV in this process
        model_kwargs: dict[str, Any],
    ) -> GivenCache:
        """Make an empty static KV cache as long as transformers would, which then becomes the handle of a session."""
        own = super()._prepare_static_cache  # type: ignore[misc]
        empty = own(cache_implementation, batch_size, max_cache_len, None, model_kwargs)
        return check_empty(empty, self.config)

    def _choose_sizes(self, config: GenerationConfig, model_kwargs: dict[str, Any], batch_size: int) -> tuple[int, ...]:
        """Return the rows of the microbatches that a call's batch runs as, and keep them for steps without KV."""
        call = _call.get()
        past = model_kwargs.get(self._cache_name or "")
        if call is None or call.model is not self:
            return ()
        if model_kwargs.get(ENCODED) is not None or holds_pictures(model_kwargs):  # which do not belong to single rows
            if call.num_microbatches not in (None, 1):
                raise UnsupportedOperationError(
                    f"num_microbatches={call.num_microbatches} of prompts with pictures is not supported by a sharded model: leave it out"
                )
            return ()
        if isinstance(past, ShardedCache) and past.is_initialized:
            if call.num_microbatches not in (None, past.num_microbatches):
                raise ArgumentError(
                    f"num_microbatches={call.num_microbatches} with past_key_values whose rows run as {past.num_microbatches}: "
                    "leave it out, or start anew with past_key_values=None"
                )
            return ()
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        num_prompt_tokens = next((each.shape[-1] for each in (positions, mask) if each is not None), 1)
        num_together = max(config.num_beams or 1, config.num_return_sequences or 1)
        batch = Batch(
            num_rows=batch_size * num_together,
            num_together=num_together,
            mask=mask,
            prompt_tokens=num_prompt_tokens,
            new_tokens=max(1, config.max_length - num_prompt_tokens),
        )
        if call.num_microbatches is not None:
            call.sizes = call.lockstep_sizes = batch.split_as_asked(call.num_microbatches)
        else:
            call.sizes = batch.split_best(self._pipeline, in_lockstep=False)
            call.lockstep_sizes = batch.split_best(self._pipeline, in_lockstep=True, most=len(call.sizes))
        return call.sizes

    def _lockstep_sizes(self) -> tuple[int, ...]:
        """Return the rows of the microbatches of this call if each step waits for all."""
        call = _call.get()
        return () if call is None or call.model is not self else call.lockstep_sizes

    def _checked_in_call(self) -> bool:
        """Whether a `generate` of this model is running, which has checked the model for all its steps."""
        call = _call.get()
        return call is not None and call.model is self

    def _open_session(self, sizes: Sequence[int] = ()) -> ShardedCache:
        return ShardedDynamicCache(self._pipeline, self._sliding_window, sizes)

    def _open_session_for_step(self) -> ShardedCache:
        """Open a session for a step that is given none; it is split as the batch of the call that it belongs to."""
        return self._open_session(self._lockstep_sizes())


def _refuse_setting(name: str, value: object, reason: str) -> NoReturn:
    raise UnsupportedOperationError(f"{name}={value!r} is not supported by a sharded model: {reason}; leave it out")


@contextlib.contextmanager
def _generating(call: _Call, rows: Sequence[str] | None) -> Iterator[None]:
    """Record that a model, which has been checked, generates; at the end, end the sessions that the call still lists.

    `rows` are the adapters of the rows, if the call names them.
    """
    token, row_token = _call.set(call), row_adapters.set((call.model, rows))
    try:
        yield
    finally:
        _call.reset(token)
        row_adapters.reset(row_token)
        for cache in call.opened:
            cache.end()


def _may_hold(result: object, cache: ShardedCache) -> bool:
    """Return whether the result of a call may hold a session."""
    if isinstance(result, ModelOutput):
        return any(cache is each for each in result.values())
    return not isinstance(result, Tensor)  # a user's own decoding loop may return anything

"""Runs a prompt in chunks that follow each other through the stages, as transformers runs one chunk after the other.

Knows transformers' `generate` and what it asks for each chunk; neither stages nor what steps cost.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.model.hf_internals.encoding import ENCODED
from lingualinked.sharded.calling.cache import ShardedCache
from lingualinked.sharded.calling.inputs import LearnedPositions, check_inputs
from lingualinked.sharded.generating.chunk_sizes import ChunkSizes

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.cluster.sessions.any_session import AnySession
    from lingualinked.cluster.steps.step_in_flight import StepOptions

AUTO = "auto"

# The prompt that runs in chunks in this context.
_prompt: contextvars.ContextVar[ChunkedPrompt | None] = contextvars.ContextVar("prompt", default=None)


class ChunkedPrompt:
    """A prompt that runs in chunks: all are in flight at once, and only the last one computes logits."""

    def __init__(self, session: AnySession, num_tokens: int, *, is_observed: bool) -> None:
        self.session = session
        self._num_ahead = num_tokens  # per row, after the chunks so far
        self._is_observed = is_observed  # whether code of the user's sees what each chunk returns

    def options_of_next(self, options: StepOptions, num_new: int) -> StepOptions:
        """Return the options of the step of the next chunk."""
        self._num_ahead -= num_new
        return options if self._num_ahead <= 0 else options.of_chunk(self._num_ahead, is_observed=self._is_observed)


def options_of_chunk(session: AnySession, options: StepOptions, num_new: int) -> StepOptions:
    """Return the options of a step, with those of the next chunk of a prompt if one runs in this session."""
    prompt = _prompt.get()
    return options if prompt is None or prompt.session is not session else prompt.options_of_next(options, num_new)


class PipelinedPrefill:
    """Mixin that overrides how transformers' ``GenerationMixin`` runs a prompt in chunks."""

    if TYPE_CHECKING:
        config: Any
        _embedding_shape: tuple[int, int]
        _forward_hooks: dict[int, Any]
        _pipeline: Pipeline
        _positions: LearnedPositions | None

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Run a prompt as transformers does, but do not wait for one chunk before the next one is sent."""
        prefill = super()._prefill  # type: ignore[misc]
        run = functools.partial(prefill, input_ids, generation_config, model_kwargs, is_first_iteration)
        size, cache = generation_config.prefill_chunk_size, model_kwargs.get("past_key_values")
        takes_embeddings = is_first_iteration and model_kwargs.get("inputs_embeds") is not None
        if size is not None and model_kwargs.get(ENCODED) is not None:
            if size != AUTO:
                raise UnsupportedOperationError(
                    f"prefill_chunk_size={size} of a prompt with pictures is not supported by a sharded model: leave it out"
                )
            generation_config.prefill_chunk_size = size = None
        if size is None or cache is None or takes_embeddings:
            generation_config.prefill_chunk_size = None if size == AUTO else size
            try:
                return run()
            except ArgumentError as error:  # each chunk of ids would come with all embeddings
                if not takes_embeddings or size in (None, AUTO):
                    raise
                raise ArgumentError(
                    f"prefill_chunk_size={size} of inputs_embeds, which transformers does not cut into chunks: leave it out ({error})"
                ) from error
        # 1) find the new tokens
        assert isinstance(cache, ShardedCache)
        past, mask = cache.get_seq_length(), model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        ids = input_ids[:, past - length :] if length == input_ids.shape[1] else input_ids
        num_rows, num_new = ids.shape
        if size == AUTO:
            generation_config.prefill_chunk_size = self._chunk_sizes.choose(num_rows, num_new)
        # 2) refuse what a later chunk would be refused for, while the session is as it was
        check_inputs(ids, None, *self._embedding_shape)
        cache.check_room(num_new)
        if self._positions is not None:
            self._positions.check(past, num_new, mask, model_kwargs.get("position_ids"))
        # 3) run the chunks
        is_observed = bool(self._forward_hooks) or "forward" in vars(self)
        with _in_chunks(ChunkedPrompt(cache.session, num_new, is_observed=is_observed)):
            return run()

    @functools.cached_property
    def _chunk_sizes(self) -> ChunkSizes:
        return ChunkSizes(self._pipeline)


@contextlib.contextmanager
def _in_chunks(prompt: ChunkedPrompt) -> Iterator[None]:
    token = _prompt.set(prompt)
    try:
        yield
    except Exception:
        prompt.session.finish_silent_steps()
        raise
    except BaseException:  # an interrupt, as of a step
        prompt.session.end()
        raise
    finally:
        _prompt.reset(token)


def check_chunk_size(size: object) -> None:
    """Check a ``prefill_chunk_size``; raise ArgumentError if it is none."""
    if size is None or size == AUTO:
        return
    try:
        number = 0 if isinstance(size, bool) else operator.index(size)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise ArgumentError(f"prefill_chunk_size={size!r} must be a positive number of tokens, 'auto' or None")

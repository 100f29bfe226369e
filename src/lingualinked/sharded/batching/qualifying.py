"""Whether a sharded model, as it is now, and a request can be served by packed steps.

Knows the model's state and its limits; computes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from lingualinked.errors import ArgumentError, UnsupportedOperationError

# ruff: noqa: SLF001 - of the model that this is about


def check_model(model: Any) -> None:
    """Raise unless packed steps do all that is done to a model, as it is now."""
    model._pipeline.check_open()
    model._check_unchanged()
    check_between_steps(model)


def check_between_steps(model: Any) -> None:
    """Raise if the model is closed, or something is in force that a packed step would leave out."""
    model._pipeline.check_open()
    reason = model._pipeline.packed_steps.why_not
    if model._hooked_modules:
        reason = "hooks are registered: remove them, or call generate"
    elif model._open_blocks:
        reason = "a block of capture() or intervene() is open: leave it, or call generate"
    if reason:
        raise UnsupportedOperationError(f"continuous batching of this sharded model: {reason}")


def read_prompts(inputs: Any, max_new_tokens: Any) -> list[list[int]]:
    """Return the prompts of a batch as lists; what they contain is checked with each request."""
    try:
        if max_new_tokens is not None:
            operator.index(max_new_tokens)
        return [list(each) for each in inputs]
    except TypeError as error:
        raise ArgumentError(
            f"generate_batch needs a list of prompts, each a list of token ids, and a number of new tokens: {error}"
        ) from error


def check_ends(model: Any, generation: GenerationConfig, max_new_tokens: int | None) -> None:
    """Raise ArgumentError if nothing ends a text: no number of tokens, no end-of-sequence token, no learned positions."""
    limit = generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit is None and generation.eos_token_id in (None, -1) and model._positions is None:
        raise ArgumentError("no text would ever end: give max_new_tokens, or an eos_token_id in generation_config")


def check_request(
    model: Any, generation: GenerationConfig, input_ids: Sequence[int], max_new_tokens: int | None
) -> list[int]:
    """Return the ids of a prompt; raise ArgumentError if it can't be continued by so many tokens; None: as many as ``generation`` says."""
    if max_new_tokens is None:
        max_new_tokens = generation.max_new_tokens
        if max_new_tokens is None and generation.max_length is not None:
            raise ArgumentError(
                f"max_length={generation.max_length!r} ends no request of continuous batching, as in transformers: give max_new_tokens"
            )
    try:
        ids = [operator.index(each) for each in input_ids]
        limit = 1 if max_new_tokens is None else operator.index(max_new_tokens)
    except TypeError as error:
        raise ArgumentError(f"a request needs a list of token ids and a number of new tokens: {error}") from error
    vocabulary = model._embedding_shape[0]
    if not ids or limit < 0:
        raise ArgumentError(
            f"a prompt of {len(ids)} ids and max_new_tokens={limit}: give at least one id, and no negative number"
        )
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ArgumentError(
            f"input_ids range from {min(ids)} to {max(ids)}, but the vocabulary from 0 to {vocabulary - 1}: use the model's own "
            "tokenizer"
        )
    if model._positions is not None:
        model._positions.check(0, len(ids) + max(0, limit - 1), None, None)
    return ids

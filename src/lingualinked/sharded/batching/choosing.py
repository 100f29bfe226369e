"""How the tokens of each request of a continuous batch are chosen: by the last stage, or from logits in this process.

Knows transformers' logits processors for continuous batching; neither microbatches nor sessions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lingualinked.model.packed.choosing import describe_choice
from lingualinked.model.packed.token_choice import TokenChoice
from lingualinked.model.sampling.choosing import Draws, choose_tokens

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList


class Chooser:
    """Chooses the tokens of all requests of a manager.

    With ``seed``, tokens are sampled; each request draws from a generator of its own, seeded by this number and its id, so that its
    tokens do not depend on what runs beside it.
    """

    def __init__(self, processors: ContinuousBatchingLogitsProcessorList, seed: int | None, *, logprobs: bool) -> None:
        self._processors = processors
        self._seed = seed
        self._logprobs = logprobs

    def begin(self, request_id: str, kwargs: Mapping[str, Any]) -> Choice:
        """Return how one request's tokens are chosen; raises TypeError or ValueError for its arguments."""
        self._processors.check_kwargs(dict(kwargs))
        processors = LogitsProcessorList([_of_request(each, kwargs) for each in self._processors.logits_processor])
        seeds = None if self._seed is None else random.Random(f"{self._seed} {request_id}")  # noqa: S311 - of no keys
        return Choice(processors, seeds, logprobs=self._logprobs)


class Choice:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, processors: LogitsProcessorList, seeds: random.Random | None, *, logprobs: bool) -> None:
        self._processors = processors
        self._seeds = seeds
        self._logprobs = logprobs
        self._specs = describe_choice(processors)

    def for_stage(self) -> TokenChoice | None:
        """Return what the last stage needs to choose the next token; ``None``: it has to send the logits."""
        if self._specs is None:
            return None
        return TokenChoice(processors=self._specs, seed=self._next_seed(), returns_logprob=self._logprobs)

    def choose(self, logits: Tensor, ids: Sequence[int]) -> tuple[int, float | None]:
        """Choose the next token of a text from its logits ``[vocabulary]``; return it and its logprob, if outputs have it."""
        seed = self._next_seed()
        draws = None if seed is None else Draws(torch.Generator().manual_seed(seed))
        text, row = torch.tensor([ids]), logits[None]
        token = int(choose_tokens(row, text, self._processors, draws))
        if not self._logprobs:
            return token, None
        scores = self._processors(text, row.to(copy=True, dtype=torch.float32))  # type: ignore[arg-type]
        return token, float(torch.nn.functional.softmax(scores, dim=-1)[0, token].log())

    def _next_seed(self) -> int | None:
        return None if self._seeds is None else self._seeds.getrandbits(63)


def _of_request(processor: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return what a processor for continuous batching is for one request: the plain one, with that request's own value."""
    value = {name: kwargs.get(name, getattr(processor, name, None)) for name in ("temperature", "top_k", "top_p")}
    match type(processor).__name__:
        case "ContinuousBatchingTemperatureLogitsWarper":
            return TemperatureLogitsWarper(value["temperature"])
        case "ContinuousBatchingTopKLogitsWarper":
            return TopKLogitsWarper(value["top_k"], processor.filter_value, processor.min_tokens_to_keep)
        case "ContinuousBatchingTopPLogitsWarper":
            return TopPLogitsWarper(value["top_p"], processor.filter_value, processor.min_tokens_to_keep)
    return processor

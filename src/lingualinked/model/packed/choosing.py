"""Chooses the next token of each of several texts from their logits.

Knows logits and choices; neither texts nor the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from lingualinked.errors import ProtocolError
from lingualinked.model.packed.token_choice import TokenChoice
from lingualinked.model.sampling.processor_data import ProcessorSpec
from lingualinked.model.sampling.processors import SCORE_PROCESSORS, build_processors, describe_processors


class ChosenTokens(NamedTuple):
    """The tokens that were chosen, in order, and the logarithms of the probabilities of those whose choices return them.

    ``failed`` says why none could be chosen, by the place of the choice.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    failed: Mapping[int, Exception]


def describe_choice(processors: Iterable[LogitsProcessor]) -> tuple[ProcessorSpec, ...] | None:
    """Describe logits processors for a `TokenChoice`; None if one can't be, or reads the ids of the text, which stages don't know."""
    specs = describe_processors(processors)
    return None if specs is None or any(spec.kind not in SCORE_PROCESSORS for spec in specs) else specs


def check_choice(choice: TokenChoice) -> None:
    """Raise ProtocolError if a choice has processors that `describe_choice` does not describe."""
    for spec in choice.processors:
        if spec.kind not in SCORE_PROCESSORS:
            raise ProtocolError(f"{spec.kind!r} is not a logits processor that chooses tokens in a packed step")


def choose_tokens(logits: Tensor, choices: Sequence[TokenChoice], lengths: Sequence[int]) -> ChosenTokens:
    """Choose a token for each row of logits ``[texts, vocabulary]``; no row affects the others, nor does one that fails.

    `lengths` are the numbers of tokens of the texts so far.
    """
    # 1) process each text's scores
    scores = logits.to(copy=True, dtype=torch.float32)
    failed: dict[int, Exception] = {}
    for row, (choice, length) in enumerate(zip(choices, lengths, strict=True)):
        if choice.processors:
            ids = torch.zeros((1, length), dtype=torch.long, device=scores.device)
            try:
                scores[row : row + 1] = build_processors(choice.processors)(ids, scores[row : row + 1])  # type: ignore[arg-type]
            except Exception as error:  # noqa: BLE001 - a setting that its text's owner made
                failed[row] = error
    # 2) choose
    tokens: list[int] = scores.argmax(dim=-1).tolist()
    for row, choice in enumerate(choices):
        if choice.seed is not None and row not in failed:
            try:
                generator = torch.Generator(scores.device).manual_seed(choice.seed)
                tokens[row] = int(torch.multinomial(scores[row].softmax(dim=-1), 1, generator=generator))
            except Exception as error:  # noqa: BLE001 - scores of which none is a number, or all are excluded
                failed[row] = error
    # 3) say how probable they were
    returned = [row for row, choice in enumerate(choices) if choice.returns_logprob and row not in failed]
    logprobs: list[float] = []
    if returned:
        places = torch.tensor([[tokens[row]] for row in returned], device=scores.device)
        logprobs = scores[returned].softmax(dim=-1).gather(1, places).log().squeeze(1).tolist()  # as transformers does
    chosen = tuple(token for row, token in enumerate(tokens) if row not in failed)
    return ChosenTokens(chosen, tuple(logprobs), failed)

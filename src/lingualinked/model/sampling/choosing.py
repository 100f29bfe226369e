"""Chooses the next tokens from logits, as the loop of transformers' ``generate`` does.

Knows tensors and processors; neither steps nor where the logits come from.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Generator, Tensor
from transformers import LogitsProcessorList

from lingualinked.model.sampling.processor_data import BatchRows


@dataclasses.dataclass(slots=True)
class Draws:
    """The random numbers with which rows are sampled.

    If the rows are a part of a batch, each draw is for the whole batch, and their own numbers are used: parts whose generators have
    the same state get the tokens that they get when the batch is sampled as one.
    """

    generator: Generator
    rows: BatchRows | None = None


def choose_tokens(
    logits: Tensor, input_ids: Tensor, processors: LogitsProcessorList, draws: Draws | None = None
) -> Tensor:
    """Choose the next token of each row, int64 ``[rows]``, from logits ``[rows, vocabulary]`` on the CPU.

    With ``draws`` they are sampled, else the likeliest is chosen. ``input_ids``, int64 ``[rows, tokens]``, is the text so far.
    """
    scores = processors(input_ids, logits.to(copy=True, dtype=torch.float32))  # type: ignore[arg-type]
    if draws is None:
        return torch.argmax(scores, dim=-1)
    probabilities = torch.nn.functional.softmax(scores, dim=-1)
    if draws.rows is None:
        return torch.multinomial(probabilities, num_samples=1, generator=draws.generator).squeeze(1)
    # As torch.multinomial does with all rows: exponentially distributed numbers, by which it divides.
    first, stop, num_rows = draws.rows
    drawn = torch.empty(num_rows, probabilities.shape[1]).exponential_(1, generator=draws.generator)
    return torch.argmax(probabilities / drawn[first:stop], dim=-1)


def skip_draws(num_rows: int, vocabulary: int, generator: Generator | None = None) -> None:
    """Advance a generator, torch's own if it is None, as choosing the tokens of so many rows once does."""
    generator = torch.default_generator if generator is None else generator
    number = num_rows * vocabulary
    if _cheap_draws_are_alike():
        torch.rand(number, dtype=torch.float64, generator=generator)
    else:
        torch.empty(number).exponential_(1, generator=generator)


@functools.cache
def _cheap_draws_are_alike() -> bool:
    """Whether this build of torch draws as many random bits for uniform numbers of 64 bits as for exponential ones, for a tenth of the time."""
    uniform, exponential = torch.Generator(), torch.Generator()
    for number in (1, 7, 16, 1000):  # some builds draw small tensors in another way
        torch.rand(number, dtype=torch.float64, generator=uniform)
        torch.empty(number).exponential_(1, generator=exponential)
    return torch.equal(uniform.get_state(), exponential.get_state())

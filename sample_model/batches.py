"""Packed batches: examples laid end to end in rows of one length, each blind to its neighbours.

Knows tokens and tensors, not the model. In names of tensors, B is rows, T is positions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sample_model.grammar import Example

# A sentiment is one token of forty, a story's every token is text to learn: weights even that out.
_ANSWER_WEIGHT = {"translation": 1.0, "summary": 1.0, "sentiment": 4.0, "story": 0.3}
# Prompts of the other tasks are mostly chance; a little of them teaches which words belong together.
_PROMPT_WEIGHT = {"translation": 0.1, "summary": 0.2, "sentiment": 0.1, "story": 0.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Packed rows, as the model's `forward` and the loss take them."""

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    weights_BT: Tensor
    position_ids_BT: Tensor
    attention_mask_B1TT: Tensor


@dataclass(slots=True)
class _Row:
    """A row in the making: token, target, loss weight, position and example number of each place."""

    places: list[tuple[int, int, float, int, int]] = field(default_factory=list)
    examples: int = 0

    def add(self, ids: list[int], weights: list[float]) -> None:
        self.examples += 1
        for position, (token, target, weight) in enumerate(zip(ids, ids[1:], weights, strict=False)):
            self.places.append((token, target, weight, position, self.examples))


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Return an example's tokens and how much the prediction of each next one weighs.

    Parameters
    ----------
    example : Example
        What to encode.
    tokenizer : PreTrainedTokenizerFast
        Puts a beginning-of-text token first; the end-of-text token is added here.

    Returns
    -------
    ids : list of int
        All tokens.
    weights : list of float
        One for each token but the last.
    """
    prompt_ids: list[int] = tokenizer(example.prompt).input_ids
    # The space belongs to the answer's first token, as in generation.
    answer_ids: list[int] = tokenizer(f" {example.answer}", add_special_tokens=False).input_ids
    weights = [_PROMPT_WEIGHT[example.task]] * (len(prompt_ids) - 1)
    weights += [_ANSWER_WEIGHT[example.task]] * (len(answer_ids) + 1)
    return [*prompt_ids, *answer_ids, tokenizer.eos_token_id], weights


def _stack(rows: list[_Row], length: int) -> Batch:
    padded = [row.places + [(0, 0, 0.0, 0, 0)] * (length - len(row.places)) for row in rows]
    columns = [[[place[i] for place in row] for row in padded] for i in range(5)]
    example_BT = torch.tensor(columns[4])
    same_B1TT = example_BT[:, None, :, None] == example_BT[:, None, None, :]
    return Batch(
        input_ids_BT=torch.tensor(columns[0]),
        target_ids_BT=torch.tensor(columns[1]),
        weights_BT=torch.tensor(columns[2]),
        position_ids_BT=torch.tensor(columns[3]),
        attention_mask_B1TT=same_B1TT & torch.ones(length, length, dtype=torch.bool).tril(),
    )


def pack_tales(
    tales: Iterable[Example], tokenizer: PreTrainedTokenizerFast, *, num_rows: int, row_tokens: int
) -> Iterator[Batch]:
    """Yield batches of long rows, each of tales that follow each other without an end of text.

    They teach what comes after the end of a tale when generation does not stop there, and attention over long distances.

    Parameters
    ----------
    tales : iterable of Example
        Taken in order; the last of a row is cut.
    tokenizer : PreTrainedTokenizerFast
        The model's.
    num_rows, row_tokens : int
        Shape of a batch.

    Yields
    ------
    Batch
        Each row is one text.
    """
    stream = iter(tales)
    while True:
        rows = [_Row() for _ in range(num_rows)]
        for row in rows:
            text, ids = next(stream).text, list[int]()
            while len(ids) <= row_tokens:
                ids = tokenizer(text).input_ids
                text = f"{text} {next(stream).text}"
            row.add(ids[: row_tokens + 1], [_ANSWER_WEIGHT["story"]] * row_tokens)
        yield _stack(rows, row_tokens)


def pack(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, *, num_rows: int, row_tokens: int
) -> Iterator[Batch]:
    """Yield full batches of packed examples.

    Parameters
    ----------
    examples : iterable of Example
        Taken in order; one longer than a row is left out.
    tokenizer : PreTrainedTokenizerFast
        The model's.
    num_rows, row_tokens : int
        Shape of a batch.

    Yields
    ------
    Batch
        Each example lies whole in one row.
    """
    rows = [_Row() for _ in range(num_rows)]
    for example in examples:
        ids, weights = encode(example, tokenizer)
        # The last token is only ever a target.
        needed = len(ids) - 1
        if needed > row_tokens:
            continue
        row = next((row for row in rows if len(row.places) + needed <= row_tokens), None)
        if row is None:
            yield _stack(rows, row_tokens)
            rows = [_Row() for _ in range(num_rows)]
            row = rows[0]
        row.add(ids, weights)

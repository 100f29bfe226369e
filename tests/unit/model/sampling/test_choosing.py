"""Tokens are chosen as transformers' loop chooses them, for a batch as one and in parts, and the generator ends where it would."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from lingualinked.model.sampling.choosing import Draws, choose_tokens, skip_draws
from lingualinked.model.sampling.processor_data import BatchRows

IDS = torch.zeros(6, 1, dtype=torch.long)


def logits(rows: int = 6, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_the_likeliest() -> None:
    assert torch.equal(choose_tokens(logits(), IDS, LogitsProcessorList()), logits().argmax(-1))


@pytest.mark.parametrize("rows", [1, 6])
def test_sampled_tokens_are_those_of_torch(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    for _ in range(3):
        expected = torch.multinomial((logits(rows).float() / 0.7).softmax(-1), 1).squeeze(1)
        processors = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
        assert torch.equal(choose_tokens(logits(rows), IDS[:rows], processors, Draws(generator)), expected)
    assert torch.equal(generator.get_state(), torch.get_rng_state())


def test_parts_of_a_batch_get_the_tokens_of_the_whole() -> None:
    whole, none = Draws(torch.Generator().manual_seed(9)), LogitsProcessorList()
    parts = [Draws(torch.Generator().manual_seed(9), BatchRows(*each, 6)) for each in ((0, 1), (1, 4), (4, 6))]
    for _ in range(3):
        expected = choose_tokens(logits(), IDS, none, whole)
        chosen = [
            choose_tokens(logits()[part.rows.first : part.rows.stop], IDS, none, part)  # type: ignore[union-attr]
            for part in parts
        ]
        assert torch.equal(torch.cat(chosen), expected)
    for part in parts:
        assert torch.equal(part.generator.get_state(), whole.generator.get_state())


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (3, 50), (1, 1001)])
def test_skipped_draws_are_as_many_as_choosing_needs(rows: int, vocabulary: int) -> None:
    torch.manual_seed(2)
    torch.multinomial(torch.ones(rows, vocabulary), 1)
    expected = torch.get_rng_state()
    torch.manual_seed(2)
    skip_draws(rows, vocabulary)
    assert torch.equal(torch.get_rng_state(), expected)

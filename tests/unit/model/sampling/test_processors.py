"""Transformers' logits processors, described as plain data and made again, give the very scores."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process

from lingualinked.errors import ProtocolError
from lingualinked.model.sampling.processor_data import BatchRows, ProcessorSpec
from lingualinked.model.sampling.processors import _ATTRIBUTES, build_processors, describe_processors

EOS = torch.tensor([2, 5])
IDS = torch.tensor([[0, 3, 4, 3, 4, 9, 3, 4], [1, 2, 2, 7, 8, 1, 7, 8], [0, 0, 5, 6, 5, 6, 5, 6]])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "EncoderRepetitionPenaltyLogitsProcessor": {"penalty": 1.3, "encoder_input_ids": IDS},
    "EpsilonLogitsWarper": {"epsilon": 0.02},
    "EtaLogitsWarper": {"epsilon": 0.0003},
    "ExponentialDecayLengthPenalty": {
        "exponential_decay_length_penalty": (2, 1.1),
        "eos_token_id": EOS,
        "input_ids_seq_length": 3,
    },
    "ForcedBOSTokenLogitsProcessor": {"bos_token_id": 4},
    "ForcedEOSTokenLogitsProcessor": {"max_length": 9, "eos_token_id": EOS},
    "MinLengthLogitsProcessor": {"min_length": 30, "eos_token_id": EOS},
    "MinNewTokensLengthLogitsProcessor": {"prompt_length_to_skip": 5, "min_new_tokens": 9, "eos_token_id": EOS},
    "MinPLogitsWarper": {"min_p": 0.1, "min_tokens_to_keep": 2},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[7], [3, 4, 11], [2]], "eos_token_id": EOS},
    "NoRepeatNGramLogitsProcessor": {"ngram_size": 2},
    "RepetitionPenaltyLogitsProcessor": {"penalty": 1.2, "prompt_ignore_length": torch.tensor([1, 0, 2])},
    "SequenceBiasLogitsProcessor": {"sequence_bias": {(4,): -3.5, (3, 4, 9): 2.25, (5, 6): float("-inf")}},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": [3, 4], "begin_index": 8},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": [3, 9]},
    "TemperatureLogitsWarper": {"temperature": 0.7},
    "TopHLogitsWarper": {"top_h": 0.4},
    "TopKLogitsWarper": {"top_k": 5, "min_tokens_to_keep": 7},
    "TopPLogitsWarper": {"top_p": 0.8},
    "TypicalLogitsWarper": {"mass": 0.5},
}


def make(name: str, **arguments: Any) -> Any:
    return getattr(logits_process, name)(**(arguments or ARGUMENTS.get(name, {})))


def scores_of(processors: Any, ids: Tensor = IDS, rows: slice = slice(None)) -> Tensor:
    torch.manual_seed(3)
    scores = torch.randn(3, 12) * 3
    scores[1, 4] = (
        float("nan")
        if any(isinstance(each, logits_process.InfNanRemoveLogitsProcessor) for each in processors)
        else 0.0
    )
    for processor in processors:
        scores = processor(ids[rows], scores[rows])
    return scores


@pytest.mark.parametrize("name", _ATTRIBUTES)
def test_scores_are_those_of_the_original(name: str) -> None:
    specs = describe_processors([make(name)])
    assert specs is not None
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(specs), type=tuple[ProcessorSpec, ...])
    assert torch.equal(scores_of(build_processors(received)), scores_of([make(name)]))


@pytest.mark.parametrize("name", _ATTRIBUTES)
def test_one_that_has_been_used_is_described_alike(name: str) -> None:
    used = make(name)
    scores_of([used])
    assert describe_processors([used]) == describe_processors([make(name)])
    rebuilt = build_processors(describe_processors([used]) or ())
    assert describe_processors(rebuilt) == describe_processors([used])


@pytest.mark.parametrize("name", _ATTRIBUTES)
def test_a_part_of_the_batch_has_its_own_rows(name: str) -> None:
    specs = describe_processors([make(name)])
    part = build_processors(specs or (), BatchRows(1, 3, 3))
    assert torch.equal(scores_of(part, rows=slice(1, 3)), scores_of([make(name)])[1:])


def test_rows_of_one_prompt_share_its_ids() -> None:
    """As with ``num_return_sequences=2``: the processor knows prompts, and there are two rows of each."""
    specs = describe_processors([make("EncoderRepetitionPenaltyLogitsProcessor")])
    (processor,) = build_processors(specs or (), BatchRows(1, 4, 6))
    assert torch.equal(processor.encoder_input_ids, IDS[[0, 1, 1]])


class OwnProcessor(LogitsProcessor):
    """A user's."""


class OwnTopK(logits_process.TopKLogitsWarper):
    """A user's, with all that transformers' own has."""


def test_what_is_not_exactly_transformers_own_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    changed, odd = make("TopKLogitsWarper"), make("TemperatureLogitsWarper")
    large, small = (make("NoRepeatNGramLogitsProcessor", ngram_size=5) for _ in range(2))
    large.ngram_size, small.ngram_size = 2**63, -(2**63) - 1  # which no message can hold
    changed.note = "an attribute more"
    odd.temperature = "warm"
    for each in (OwnProcessor(), OwnTopK(5), changed, odd, large, small):
        assert describe_processors([make("LogitNormalization"), each]) is None
    monkeypatch.setattr(logits_process.TopKLogitsWarper, "__call__", lambda *_: None)
    assert describe_processors([make("TopKLogitsWarper")]) is None


@pytest.mark.parametrize(
    "spec",
    [
        ProcessorSpec("LogitsProcessor", ()),
        ProcessorSpec("TopKLogitsWarper", (5,)),
        ProcessorSpec("SequenceBiasLogitsProcessor", (1, 2, 3)),
        ProcessorSpec(
            "SuppressTokensLogitsProcessor",
            (describe_processors([make("SuppressTokensLogitsProcessor")])[0].values[0]._replace(dtype="object"),),
        ),  # type: ignore[index,union-attr]
    ],
)
def test_what_describes_none_is_refused(spec: ProcessorSpec) -> None:
    with pytest.raises(ProtocolError, match="can't be made"):
        build_processors([spec])

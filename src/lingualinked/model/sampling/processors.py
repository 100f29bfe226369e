"""Describes transformers' own logits processors as plain data, and makes them from it in another process.

Knows their attributes; neither when they are applied nor who sends them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from lingualinked.errors import ProtocolError
from lingualinked.model.sampling.processor_data import BatchRows, Number, ProcessorSpec, TensorData

# The attributes of each class whose scores depend on nothing but these, the ids and the scores before.
_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "EncoderRepetitionPenaltyLogitsProcessor": ("penalty", "encoder_input_ids"),
    "EpsilonLogitsWarper": ("epsilon", "filter_value", "min_tokens_to_keep"),
    "EtaLogitsWarper": ("epsilon", "filter_value", "min_tokens_to_keep"),
    "ExponentialDecayLengthPenalty": ("regulation_start", "regulation_factor", "eos_token_id"),
    "ForcedBOSTokenLogitsProcessor": ("bos_token_id",),
    "ForcedEOSTokenLogitsProcessor": ("max_length", "eos_token_id"),
    "InfNanRemoveLogitsProcessor": (),
    "LogitNormalization": (),
    "MinLengthLogitsProcessor": ("min_length", "eos_token_id"),
    "MinNewTokensLengthLogitsProcessor": ("prompt_length_to_skip", "min_new_tokens", "eos_token_id"),
    "MinPLogitsWarper": ("min_p", "filter_value", "min_tokens_to_keep"),
    "NoBadWordsLogitsProcessor": ("sequence_bias",),
    "NoRepeatNGramLogitsProcessor": ("ngram_size",),
    "RepetitionPenaltyLogitsProcessor": ("penalty", "prompt_ignore_length", "logits_indices", "cu_seq_lens_q"),
    "SequenceBiasLogitsProcessor": ("sequence_bias",),
    "SuppressTokensAtBeginLogitsProcessor": ("begin_suppress_tokens", "begin_index"),
    "SuppressTokensLogitsProcessor": ("suppress_tokens",),
    "TemperatureLogitsWarper": ("temperature",),
    "TopHLogitsWarper": ("top_n", "top_h", "filter_value"),
    "TopKLogitsWarper": ("top_k", "filter_value", "min_tokens_to_keep"),
    "TopPLogitsWarper": ("top_p", "filter_value", "min_tokens_to_keep"),
    "TypicalLogitsWarper": ("filter_value", "mass", "min_tokens_to_keep"),
}

_ID_PROCESSORS = frozenset(
    {
        "EncoderRepetitionPenaltyLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
    }
)
SCORE_PROCESSORS = _ATTRIBUTES.keys() - _ID_PROCESSORS
"""The classes whose scores depend on the scores before alone, or on the number of ids beside, and not on which they are."""

_MOST_INT = 2**63 - 1  # that a message can hold

# Attributes that a processor derives from the others when it is called first.
_DERIVED = {"bad_word_ids": None, "length_1_bias": None, "multi_token_biases": None, "prepared_bias_variables": False}

# Attributes with a value for each row of ids, or for each prompt, of which several rows were made.
_BY_ROW = ("encoder_input_ids", "prompt_ignore_length")

_CALLS: Mapping[type, Any] = {kind: kind.__call__ for kind in (getattr(logits_process, name) for name in _ATTRIBUTES)}

_DTYPES = (torch.bool, torch.float32, torch.int64)
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


def describe_processors(processors: Iterable[LogitsProcessor]) -> tuple[ProcessorSpec, ...] | None:
    """Describe logits processors as plain data; return None if one of them is not exactly one of transformers' own.

    A class of a user's, one with a state that changes from token to token, a changed class and an instance with other attributes
    than its class gives it can't be described.
    """
    specs = []
    for processor in processors:
        kind = type(processor)
        own = vars(processor).keys() - _DERIVED.keys()
        if kind.__call__ is not _CALLS.get(kind) or own != set(_ATTRIBUTES[kind.__name__]):
            return None
        try:
            values = tuple(
                value for name in _ATTRIBUTES[kind.__name__] for value in _describe(name, vars(processor)[name])
            )
        except TypeError:
            return None
        specs.append(ProcessorSpec(kind.__name__, values))
    return tuple(specs)


def build_processors(specs: Iterable[ProcessorSpec], rows: BatchRows | None = None) -> LogitsProcessorList:
    """Make the processors that `describe_processors` was given; for some ``rows`` of their batch, if they are given.

    Raises ProtocolError if something else was described.
    """
    try:
        return LogitsProcessorList([_build(spec, rows) for spec in specs])
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ProtocolError(f"logits processors arrived that can't be made: {error!r}") from error


def _describe(name: str, value: object) -> tuple[Number | TensorData | None, ...]:
    """Describe an attribute; raise TypeError if it is of another kind than its class gives it."""
    if name == "sequence_bias":
        lengths = torch.tensor([len(ids) for ids in value])  # type: ignore[attr-defined]
        ids = torch.tensor([int(each) for ids in value for each in ids])  # type: ignore[attr-defined]
        biases = tuple(float(bias) for bias in value.values())  # type: ignore[attr-defined]
        return _describe_tensor(lengths), _describe_tensor(ids), TensorData("float64", (len(biases),), biases)
    if isinstance(value, Tensor):
        return (_describe_tensor(value),)
    if type(value) not in (bool, int, float, type(None)) or (isinstance(value, int) and abs(value) > _MOST_INT):
        raise TypeError(name)
    return (value,)  # type: ignore[return-value]


def _describe_tensor(value: Tensor) -> TensorData:
    if value.dtype not in _DTYPES or value.device.type != "cpu" or value.requires_grad or type(value) is not Tensor:
        raise TypeError(f"{value.dtype} on {value.device}")
    return TensorData(str(value.dtype).removeprefix("torch."), tuple(value.shape), tuple(value.flatten().tolist()))


def _build(spec: ProcessorSpec, rows: BatchRows | None) -> LogitsProcessor:
    names = _ATTRIBUTES[spec.kind]
    processor: LogitsProcessor = object.__new__(getattr(logits_process, spec.kind))
    if names == ("sequence_bias",):
        lengths, ids, biases = (each.values for each in spec.values)  # type: ignore[union-attr]
        left = iter(ids)
        sequences = [tuple(next(left) for _ in range(length)) for length in lengths]  # type: ignore[arg-type]
        state: dict[str, Any] = {"sequence_bias": dict(zip(sequences, biases, strict=True)), **_DERIVED}
    else:
        state = {name: _built(name, value, rows) for name, value in zip(names, spec.values, strict=True)}
    vars(processor).update(state)
    return processor


def _built(name: str, value: Number | TensorData | None, rows: BatchRows | None) -> Number | Tensor | None:
    if not isinstance(value, TensorData):
        return value
    tensor = torch.tensor(value.values, dtype=_DTYPE_NAMES[value.dtype]).reshape(value.shape)
    if rows is None or name not in _BY_ROW:
        return tensor
    return tensor.repeat_interleave(rows.num_rows // len(tensor), dim=0)[rows.first : rows.stop]

"""Stages record what the unsharded model does, however it is cut: by transformers' hooks, or in the class's own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversations import load_stage, load_stages, prompt, spec_of
from families import FAMILIES, reference
from lingualinked.model.stage import Stage, StageInputs

pytestmark = pytest.mark.equality

RECORDS = ("hidden_states", "attentions")
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")


def record(stages: Sequence[Stage], tokens: Tensor, records: tuple[str, ...]) -> dict[str, list[Tensor | None]]:
    """Run one step through stages; return what they record, and the logits."""
    tensors: tuple[Tensor, ...] = (tokens,)
    layout = None
    recorded: dict[str, list[Tensor | None]] = {name: [] for name in records}
    for stage in stages:
        inputs = StageInputs(
            tensors=tensors, layout=layout, attention_mask=torch.ones_like(tokens), position_ids=None, records=records
        )
        output = stage.step(inputs, stage.new_cache())
        tensors, layout = tuple(tensor.clone().cpu() for tensor in output.tensors), output.layout
        for name in records:
            recorded[name] += output.recorded[name]
    return {**recorded, "logits": [*tensors]}


def assert_equal(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) is (their is None)
        assert our is None or torch.equal(our, their)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_of_stages_are_those_of_the_model(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family)
    model, tokens = reference(folder, attn_implementation="eager"), prompt(2, 7)
    all_records = (*RECORDS, *(["router_logits"] if family in EXPERTS else []))
    with torch.no_grad():
        asked = {f"output_{name}": True for name in all_records}
        whole = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **asked)
    for num_stages in (1, 3):
        stages = load_stages(spec_of(folder, attn_implementation="eager"), num_stages, 4)
        for records in (all_records, RECORDS[:1], all_records[1:], all_records[2:], ()):
            found = record(stages, tokens, records)
            assert_equal(found["logits"], [whole.logits])
            for name in records:
                assert_equal(found[name], whole[name])


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen2-moe"])
def test_stages_that_share_layers_record_them_once(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family)
    spec, tokens = spec_of(folder, attn_implementation="eager"), prompt(1, 5)
    before = load_stages(spec, 2, 4)
    expected = record(before, tokens, RECORDS)
    after = [load_stage(spec, 0, 3, shared=before), load_stage(spec, 3, 4, shared=before)]
    for stages in (after, before, after, load_stages(spec, 1, 4)):
        found = record(stages, tokens, RECORDS)
        for name, values in expected.items():
            assert_equal(found[name], values)

"""Stages record what the unsharded model does, however it is cut: by transformers' hooks, or in the class's own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from conversations import load_stage, load_stages, prompt, spec_of
from families import FAMILIES, reference
from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.steps.recorded import DueRecords, Recorded, RecordedPart, recorded_sizes
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs
from lingualinked.planning.plan import Plan

pytestmark = pytest.mark.equality

DTYPES = (torch.float32, torch.bfloat16)
RECORDS = ("hidden_states", "attentions")
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")


def record(
    stages: Sequence[Stage],
    tokens: Tensor,
    records: tuple[str, ...],
    *,
    indices: tuple[int, ...] | None = None,
    caches: Sequence[StageCache] = (),
) -> tuple[Tensor, list[RecordedPart]]:
    """Run one step through stages, after those in the caches; return the logits, and what each stage records."""
    tensors: tuple[Tensor, ...] = (tokens,)
    layout, parts = None, []
    caches = caches or [stage.new_cache() for stage in stages]
    for stage, cache in zip(stages, caches, strict=True):
        inputs = StageInputs(
            tensors=tensors,
            layout=layout,
            attention_mask=None,
            position_ids=None,
            records=records,
            hidden_state_indices=indices,
        )
        output = stage.step(inputs, cache)
        tensors, layout = tuple(tensor.clone().cpu() for tensor in output.tensors), output.layout
        kinds = [output.recorded[name] for name in records]
        layouts = tuple(tuple(item is not None for item in kind) for kind in kinds)
        parts.append(RecordedPart(layouts, tuple(item for kind in kinds for item in kind if item is not None)))
    (logits,) = tensors
    return logits, parts


def join(
    spec: ModelSpec,
    stages: Sequence[Stage],
    tokens: Tensor,
    parts: Sequence[RecordedPart],
    records: tuple[str, ...],
    *,
    indices: tuple[int, ...] | None = None,
    past: int = 0,
    max_cache_len: int = 0,
) -> Recorded:
    """Join what stages recorded as the caller does, who checks all of it."""
    due = DueRecords(
        names=records,
        hidden_state_indices=indices,
        sizes=recorded_sizes(spec),
        inputs=tokens,
        num_kv_tokens=max_cache_len or past + tokens.shape[1],
        longest_window=max(max_cache_len, past + tokens.shape[1]),
        is_autocast=False,
    )
    plan = Plan.from_spans((f"d{index}", stage.start, stage.end) for index, stage in enumerate(stages))
    return due.join(dict(enumerate(parts)), Route(1, plan))


def assert_equal(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) is (their is None)
        assert our is None or torch.equal(our, their)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_records_of_stages_are_those_of_the_model(
    family: str, dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family, dtype)
    spec = spec_of(folder, attn_implementation="eager")
    model, tokens = reference(folder, attn_implementation="eager"), prompt(2, 7)
    all_records = (*RECORDS, *(["router_logits"] if family in EXPERTS else []))
    with torch.no_grad():
        asked = {f"output_{name}": True for name in all_records}
        whole = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **asked)
    for num_stages in (1, 3):
        stages = load_stages(spec, num_stages, 4)
        for records in (all_records, RECORDS[:1], all_records[1:], all_records[2:], ()):
            logits, parts = record(stages, tokens, records)
            assert torch.equal(logits, whole.logits)
            found = join(spec, stages, tokens, parts, records)
            for name in records:
                assert_equal(found[name], whole[name])


@pytest.mark.parametrize("max_cache_len", [0, 12])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3", "mistral", "mixtral", "opt-350m"])
def test_decode_steps_record_what_the_model_does(
    family: str, max_cache_len: int, checkpoint: Callable[..., Path]
) -> None:
    """With growing and static KV caches, beyond a sliding window, and some hidden states by their indices."""
    if family == "bloom" and max_cache_len:
        pytest.skip("its biases by position have the length of the text")
    folder = checkpoint(family, torch.bfloat16)
    spec = spec_of(folder, attn_implementation="eager")
    model = reference(folder, attn_implementation="eager")
    records = (*RECORDS, *(["router_logits"] if family in EXPERTS else []))
    stages = load_stages(spec, 3, 4)
    past: Any = DynamicCache(config=model.config)
    if max_cache_len:
        past = StaticCache(config=model.config, max_cache_len=max_cache_len)
    caches = [stage.new_cache(max_cache_len=max_cache_len) for stage in stages]
    num_tokens, indices = 0, None
    for num_new in (7, 1, 1, 2):
        tokens = prompt(2, num_new)
        with torch.no_grad():
            asked = {f"output_{name}": True for name in records} | (
                {"output_hidden_states": [1, -1]} if indices else {}
            )
            whole = model(tokens, past_key_values=past, **asked)
        logits, parts = record(stages, tokens, records, indices=indices, caches=caches)
        length = {"past": num_tokens, "max_cache_len": max_cache_len}
        found = join(spec, stages, tokens, parts, records, indices=indices, **length)
        assert torch.equal(logits, whole.logits)
        for name in records:
            assert_equal(found[name], whole[name])
        num_tokens += num_new
        indices = (1, 4) if family != "bloom" else None


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen2-moe"])
def test_stages_that_share_layers_record_them_once(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family)
    spec, tokens = spec_of(folder, attn_implementation="eager"), prompt(1, 5)
    before = load_stages(spec, 2, 4)
    expected = join(spec, before, tokens, record(before, tokens, RECORDS)[1], RECORDS)
    after = [load_stage(spec, 0, 3, shared=before), load_stage(spec, 3, 4, shared=before)]
    for stages in (after, before, after, load_stages(spec, 1, 4)):
        found = join(spec, stages, tokens, record(stages, tokens, RECORDS)[1], RECORDS)
        for name, values in expected.items():
            assert_equal(found[name], values)
        modules = [module for stage in stages for module in stage.span.model.modules()]
        assert not any(module._forward_hooks for module in modules)  # which steps that record nothing would pay for


def test_steps_that_record_are_not_captured(checkpoint: Callable[..., Path]) -> None:
    """A stage that captures graphs runs such steps as they are, between others that it replays; all have the same bits."""
    spec = spec_of(checkpoint("llama", torch.bfloat16), attn_implementation="eager")
    plain, capturing = load_stages(spec, 1, 4), load_stages(spec, 1, 4)
    capturing[0].graphs.record = lambda body: body
    caches = [[stages[0].new_cache(max_cache_len=24)] for stages in (plain, capturing)]
    for index in range(16):
        tokens = prompt(2, 1 if index else 7)
        records = RECORDS if index % 5 == 4 else ()
        ours, theirs = (
            record(stages, tokens, records, caches=cache)
            for stages, cache in zip((capturing, plain), caches, strict=True)
        )
        replayed = capturing[0].graphs.num_replayed
        assert torch.equal(ours[0], theirs[0])
        assert_equal(ours[1][0].tensors, theirs[1][0].tensors)
        assert bool(theirs[1][0].tensors) is bool(records)
    assert 0 < replayed < 16 - 3

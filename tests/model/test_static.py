"""Stages with static KV caches, chained in this process, give the logits of the unsharded model with one: every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import accelerators
from conversations import Cut, Whole, assert_equal, beams, extend, load_stages, prompt, spec_of
from families import FAMILIES, reference, tiny_model
from lingualinked.errors import ArgumentError

pytestmark = pytest.mark.equality

NUM_LAYERS = 4
UNABLE = "falcon-rw"  # its ALiBi does not fit a static KV cache
ABLE = [family for family in FAMILIES if family != UNABLE]
MAKES_MASKS = "create_masks_for_generate"

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ABLE)
def test_cut_anywhere_is_exact(family: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family, dtype)
    model, spec = reference(folder), spec_of(folder)
    for max_cache_len, num_stages in ((17, 1), (30, 3)):  # just enough, and more
        mask_width = max_cache_len if family == "bloom" else 0  # as ``generate`` makes Bloom's
        stages = load_stages(spec, num_stages, NUM_LAYERS)
        whole = beams(Whole(model, max_cache_len=max_cache_len), mask_width=mask_width)
        assert_equal(beams(Cut(stages, max_cache_len=max_cache_len), mask_width=mask_width), whole)


@pytest.mark.parametrize("lengths", [(1,) * 4, (4, 9, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("window", [1, 6, 9, 10, 60])  # the prompts are of 9 tokens
@pytest.mark.parametrize("family", ["gemma2", "mistral", "qwen2"])
def test_sliding_windows_of_any_width_are_exact(
    family: str, window: int, lengths: tuple[int, ...], checkpoint: Checkpoint
) -> None:
    folder = checkpoint(family)
    model, spec = reference(folder, sliding_window=window), spec_of(folder, sliding_window=window)
    stages = load_stages(spec, 2, NUM_LAYERS)
    max_cache_len = 9 + sum(lengths)
    whole = beams(Whole(model, max_cache_len=max_cache_len), lengths)
    assert_equal(beams(Cut(stages, max_cache_len=max_cache_len), lengths), whole)


@pytest.mark.parametrize("family", ["mistral", "phi3", "starcoder2"])
def test_sliding_windows_alone_go_on_for_ever(family: str, checkpoint: Checkpoint) -> None:
    # The length, 4, is shorter than the window, 6, and than the prompt, 9.
    folder = checkpoint(family)
    model, stages = reference(folder), load_stages(spec_of(folder), 2, NUM_LAYERS)
    assert_equal(beams(Cut(stages, max_cache_len=4)), beams(Whole(model, max_cache_len=4)))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_that_exceeds_the_length_is_refused(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, stages = reference(folder), load_stages(spec_of(folder), 2, NUM_LAYERS)
    cut, whole = Cut(stages, max_cache_len=10), Whole(model, max_cache_len=10)
    mask = torch.ones(1, 9, dtype=torch.long)
    assert_equal([cut.step(prompt(1, 9), mask, None)], [whole.step(prompt(1, 9), mask, None)])
    with pytest.raises(ArgumentError, match="max_cache_len"):
        cut.step(prompt(1, 2), extend(mask, 2), None)
    mask = extend(mask, 1)
    assert_equal([cut.step(prompt(1, 1), mask, None)], [whole.step(prompt(1, 1), mask, None)])
    if accelerators.chosen == "cpu":  # on a GPU, an index beyond a tensor can't be survived
        with pytest.raises(IndexError):
            whole.step(prompt(1, 2), extend(mask, 2), None)


def test_what_the_class_can_not_do_its_stages_can_not(checkpoint: Checkpoint) -> None:
    folder = checkpoint(UNABLE)
    stages = load_stages(spec_of(folder), 2, NUM_LAYERS)
    for conversation in (Whole(reference(folder), max_cache_len=25), Cut(stages, max_cache_len=25)):
        with pytest.raises(RuntimeError, match="must match the size"):
            beams(conversation)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_mask_of_four_dimensions_is_exact(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, stages = reference(folder), load_stages(spec_of(folder), 2, NUM_LAYERS)
    cut, whole = Cut(stages, max_cache_len=12), Whole(model, max_cache_len=12)
    mask = torch.ones(9, 12, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, 0] = False
    mask[1, :, 0, 0] = True
    positions = torch.arange(9)[None]
    assert_equal([cut.step(prompt(2, 9), mask, positions)], [whole.step(prompt(2, 9), mask, positions)])


def test_only_bloom_makes_masks_of_its_own_for_generate() -> None:
    own = [
        name
        for name in sorted({type(tiny_model(each, torch.float32)).__name__ for each in FAMILIES})
        if hasattr(getattr(transformers, name), MAKES_MASKS)
    ]
    assert own == ["BloomForCausalLM"]

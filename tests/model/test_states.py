"""Models whose layers keep states of other kinds than KV: chained stages are exact, whatever is done with a text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversations import (
    Cut,
    Whole,
    assert_equal,
    beam_and_back,
    beams,
    extend,
    greedy,
    load_stage,
    load_stages,
    positions_of,
    prompt,
    spec_of,
)
from families import reference
from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage
from moves import Moving
from state_models import OWN, STATES, save_state_model

pytestmark = [pytest.mark.equality, pytest.mark.slow]

NUM_LAYERS = 4
DTYPES = (torch.float32, torch.bfloat16)
# What transformers can crop, since it keeps all that it needs; of one, only with its past.
CROPPED = ("deepseek-v32", "gemma3n", "lfm2")
LENGTHS = (1, 1, 1, 1)
SHARED = "gemma3n"  # whose last layer uses the KV of the second one: only one cut is possible

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in folders:
            folders[name, dtype] = save_state_model(name, dtype, tmp_path_factory.mktemp(name))
        return folders[name, dtype]

    return folder


def continued(conversation: Whole | Cut) -> list[Tensor]:
    """Give the logits of a prompt, of several tokens more, and of one."""
    return [conversation.step(prompt(1, num_new), None, None) for num_new in (5, 4, 1)]


def cut_in(spec: ModelSpec, name: str, num_stages: int) -> list[Stage]:
    if name == SHARED:
        return [load_stage(spec, 0, 1), load_stage(spec, 1, NUM_LAYERS)]
    return load_stages(spec, num_stages, NUM_LAYERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STATES)
def test_cut_anywhere_and_moved_is_exact(name: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name, dtype)
    model, spec = reference(folder), spec_of(folder)
    said, beamed = greedy(Whole(model), 6), beams(Whole(model), LENGTHS)
    for num_stages in (2, 3, NUM_LAYERS):
        stages = cut_in(spec, name, num_stages)
        assert_equal(greedy(Cut(stages), 6), said)
        assert_equal(beams(Cut(stages), LENGTHS), beamed)
    if name == SHARED:
        return
    assert_equal(greedy(Moving(spec, random.Random(f"{name} {dtype}")), 6), said)
    assert_equal(beams(Moving(spec, random.Random(f"{dtype} {name}")), LENGTHS), beamed)


@pytest.mark.parametrize("name", STATES)
def test_several_tokens_after_others_are_exact(name: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name)
    assert_equal(continued(Cut(cut_in(spec_of(folder), name, 2))), continued(Whole(reference(folder))))


@pytest.mark.parametrize("name", STATES)
def test_sessions_do_not_touch_each_other(name: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name)
    model, stages = reference(folder), cut_in(spec_of(folder), name, 2)
    one, other, expected = Cut(stages), Cut(stages), [beams(Whole(model), LENGTHS), greedy(Whole(model), 3)]
    tokens = prompt(1, 9)
    mask = torch.ones_like(tokens)
    logits = [one.step(tokens, mask, positions_of(mask, 9))]
    assert_equal(beams(other, LENGTHS), expected[0])
    forked = Cut(stages)
    forked.caches = [cache.copy() for cache in one.caches if cache is not None]
    for conversation in (one, forked):  # each goes on from the same prompt
        said, seen = logits[:], mask
        for _ in range(3):
            seen = extend(seen, 1)
            said.append(conversation.step(said[-1][:, -1:].argmax(-1), seen, positions_of(seen, 1), 1))
        assert_equal(said, expected[1])


@pytest.mark.parametrize("name", STATES)
def test_sessions_become_rows_of_one(name: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name)
    stages, whole = cut_in(spec_of(folder), name, 2), Whole(reference(folder))
    tokens = prompt(1, 6)
    one, other = Cut(stages), Cut(stages)
    for conversation in (one, other, whole):
        conversation.step(tokens, None, None)
    whole.reorder(torch.tensor([0, 0]))
    for cache, twin in zip(one.caches, other.caches, strict=True):
        assert cache is not None
        assert twin is not None
        cache.append_rows([twin])
    assert_equal([one.step(prompt(2, 1), None, None)], [whole.step(prompt(2, 1), None, None)])


@pytest.mark.parametrize("name", STATES)
def test_crop_is_exact_or_refused(name: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name)
    stages = cut_in(spec_of(folder), name, 2)
    if name in CROPPED:
        model = reference(folder)
        assert_equal(
            beam_and_back(Cut(stages, records_past=True)),
            beam_and_back(Whole(model, records_past=True)),
        )
        return
    cut = Cut(stages)
    cut.step(prompt(1, 9), None, None)
    with pytest.raises(ArgumentError, match="can't crop"):
        cut.crop(1)
    whole = Whole(reference(folder))
    whole.step(prompt(1, 9), None, None)
    with pytest.raises(RuntimeError):
        whole.crop(1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    # transformers itself can't run XLNet in bfloat16, whose positions are in float32.
    [(name, dtype) for name in OWN for dtype in DTYPES if (name, dtype) != ("xlnet", torch.bfloat16)],
    ids=str,
)
def test_models_with_objects_of_their_own_are_exact(name: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name, dtype)
    model, spec = reference(folder), spec_of(folder)
    keeps_kv = name != "openai-gpt"  # which keeps nothing: each step is of the whole text
    steps = [(2, 5), (2, 1), (2, 1)] if keeps_kv else [(2, 5), (2, 9)]

    def say(conversation: Whole | Cut) -> list[Tensor]:
        return [conversation.step(prompt(*shape), None, None) for shape in steps]

    said = say(Whole(model))
    for num_stages in (2, 3, NUM_LAYERS):
        stages = load_stages(spec, num_stages, NUM_LAYERS)
        one, other = Cut(stages), Cut(stages)
        first = one.step(prompt(*steps[0]), None, None)
        assert_equal(say(other), said)
        forked = Cut(stages)
        forked.caches = [cache.copy() for cache in one.caches if cache is not None]
        for conversation in (one, forked):
            rest = [conversation.step(prompt(*shape), None, None) for shape in steps[1:]]
            assert_equal([first, *rest], said)


@pytest.mark.parametrize("name", ["rwkv", "xlstm", "xlnet"])
def test_objects_of_their_own_move(name: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name)

    def say(conversation: Whole | Cut) -> list[Tensor]:
        return [conversation.step(prompt(2, num_new), None, None) for num_new in (5, 1, 1, 1, 1, 1)]

    said = say(Whole(reference(folder)))
    for seed in range(3):
        assert_equal(say(Moving(spec_of(folder), random.Random(f"{name} {seed}"))), said)


@pytest.mark.parametrize("name", ["rwkv", "xlstm"])
def test_what_is_not_possible_with_an_object_of_their_own_is_refused(name: str, checkpoint: Checkpoint) -> None:
    cut = Cut(load_stages(spec_of(checkpoint(name)), 2, NUM_LAYERS))
    cut.step(prompt(2, 5), None, None)
    cache = cut.caches[0]
    assert cache is not None
    assert cache.nbytes > 0
    assert cache.num_rows == 2
    cut.reorder(torch.tensor([0, 1]))
    with pytest.raises(ArgumentError, match="can't be reordered"):
        cut.reorder(torch.tensor([1, 0]))
    with pytest.raises(ArgumentError, match="run the text again"):
        cut.crop(1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("xlstm", {"class": "PreTrainedModel"}),
        ("xlstm", {"class": "xLSTMModel", "num_rows": -1}),
        ("rwkv", {"num_rows": "two"}),
        ("rwkv", {"state.layers.9": torch.zeros(2, 32)}),
        ("rwkv", {"state.7.x": 1}),
    ],
)
def test_what_does_not_fit_is_refused(name: str, wrong: dict[str, Any], checkpoint: Checkpoint) -> None:
    stage = load_stage(spec_of(checkpoint(name)), 0, 2)
    ((_, layer), _) = stage.new_cache().states([0, 1])
    with pytest.raises(ProtocolError):
        layer.write_state({"num_rows": 2, **wrong}, torch.device("cpu"))

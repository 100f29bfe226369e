"""What modules keep from step to step belongs to the session: texts beside each other, padded, in beams, forked and moved.

The reference is a model of its own for each text, since unsharded transformers has one place for the values of all.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import accelerators
from conversations import Cut, Whole, assert_equal, beams, greedy, load_stage
from lingualinked.model.cutting.footprint import measure_footprint
from lingualinked.model.cutting.parts import build_meta, find_parts
from lingualinked.model.kv.kept_values import tensors_in
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weights.checkpoint import resolve_files
from moves import Moving

CONFIG = RecurrentGemmaConfig(
    vocab_size=97,
    hidden_size=32,
    lru_width=32,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=8,
    attention_window_size=6,
    block_types=["recurrent", "recurrent", "attention"],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, ModelSpec]:
    folder = tmp_path_factory.mktemp("recurrent")
    torch.manual_seed(1)
    RecurrentGemmaForCausalLM(CONFIG).to(request.param).save_pretrained(folder)
    spec = ModelSpec(
        class_name="RecurrentGemmaForCausalLM",
        config_json=CONFIG.to_json_string(use_diff=False),
        dtype=str(request.param).removeprefix("torch."),
        attn_implementation=None,
        load_format="safetensors",
        files=resolve_files(folder),
    )
    whole = RecurrentGemmaForCausalLM.from_pretrained(folder, dtype=request.param).eval()
    return accelerators.on_accelerator(whole), spec


def alone(model: PreTrainedModel) -> Whole:
    return Whole(copy.deepcopy(model))


@pytest.mark.parametrize("ends", [(4,), (2, 4), (1, 2, 3, 4)], ids=str)
def test_stages_keep_what_modules_keep(model: tuple[PreTrainedModel, ModelSpec], ends: tuple[int, ...]) -> None:
    whole, spec = model
    stages = [load_stage(spec, start, end) for start, end in itertools.pairwise((0, *ends))]
    assert_equal(greedy(Cut(stages)), greedy(alone(whole)))
    assert_equal(
        beams(Cut(stages)), beams(alone(whole))
    )  # which do not reorder what modules keep, as in the whole model
    assert_equal(greedy(Cut(stages)), greedy(alone(whole)))


@pytest.mark.parametrize("seed", range(6))
def test_what_modules_keep_moves_with_their_layers(model: tuple[PreTrainedModel, ModelSpec], seed: int) -> None:
    whole, spec = model
    assert_equal(greedy(Moving(spec, random.Random(seed))), greedy(alone(whole)))
    assert_equal(beams(Moving(spec, random.Random(seed))), beams(alone(whole)))


def test_texts_beside_each_other_have_their_own(model: tuple[PreTrainedModel, ModelSpec]) -> None:
    whole, spec = model
    stages = [load_stage(spec, 0, 2), load_stage(spec, 2, 4)]
    texts = [torch.randint(3, 97, (rows, 20)) for rows in (2, 1, 2)]

    def say(conversation: Whole | Cut, text: Tensor, first: int) -> Iterator[Tensor]:
        yield conversation.step(text[:, :first], None, None)
        for end in range(first + 1, 21):
            yield conversation.step(text[:, end - 1 : end], None, None)

    expected = [list(say(alone(whole), text, first)) for text, first in zip(texts, (9, 1, 4), strict=True)]
    running = [say(Cut(stages), text, first) for text, first in zip(texts, (9, 1, 4), strict=True)]
    said: list[list[Tensor]] = [[], [], []]
    rng = random.Random(3)
    left = [index for index, steps in enumerate(expected) for _ in steps]
    rng.shuffle(left)
    for index in left:
        said[index].append(next(running[index]))
    for mine, wanted in zip(said, expected, strict=True):
        assert_equal(mine, wanted)


def test_a_copy_goes_on_by_itself(model: tuple[PreTrainedModel, ModelSpec]) -> None:
    whole, spec = model
    text = torch.randint(3, 97, (2, 12))
    ours, theirs = Cut([load_stage(spec, 0, 3), load_stage(spec, 3, 4)]), alone(whole)
    for each in (ours, theirs):
        each.step(text[:, :9], None, None)
    copied = copy.copy(ours)
    copied.caches = [cache.copy() for cache in ours.caches if cache is not None]
    theirs_copied = copy.deepcopy(theirs)
    for tokens in (text[:, 9:10], text[:, 10:11]):
        assert torch.equal(ours.step(tokens, None, None), theirs.step(tokens, None, None))
    for tokens in (text[:, 3:4], text[:, 11:12]):
        assert torch.equal(copied.step(tokens, None, None), theirs_copied.step(tokens, None, None))
    bytes_kept = [cache.modules.nbytes for cache in copied.caches if cache is not None]
    assert all(bytes_kept[:1])
    assert [cache.nbytes - kept for cache, kept in zip(copied.caches, bytes_kept, strict=True) if cache is not None][
        1:
    ] == [0]


def test_planning_counts_what_modules_keep(model: tuple[PreTrainedModel, ModelSpec]) -> None:
    whole, spec = model
    meta_model = build_meta(spec)
    profile = measure_footprint(meta_model, find_parts(meta_model), spec).profile
    size = whole.dtype.itemsize
    recurrent = 32 * 4 + 32 * 3 * size  # in float32, and inputs of the convolution
    assert profile.layer_state_bytes == (recurrent, recurrent, 0, recurrent)
    conversation = Cut([load_stage(spec, 0, 4)])
    conversation.step(torch.ones(3, 1, dtype=torch.long), None, None)
    assert sum(each.nbytes for each in tensors_in(conversation.caches[0].modules.values)) == 3 * 3 * recurrent

"""Stages, chained in this process, give the unsharded model's logits bit for bit: every family, dtype and cut.

No family needs a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import accelerators
from accelerators import embed
from conversations import (
    Cut,
    Whole,
    assert_equal,
    beam_and_back,
    extend,
    greedy,
    in_chunks,
    load_stage,
    load_stages,
    positions_of,
    prompt,
    spec_of,
)
from families import FAMILIES, reference, tiny_config
from lingualinked.model.stages.stage_data import StageInputs

pytestmark = [pytest.mark.equality, pytest.mark.slow]

NUM_LAYERS = 4
NUM_STAGES = (1, 2, 3, NUM_LAYERS)
DTYPES = (torch.float32, torch.bfloat16)

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_anywhere_is_exact(family: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family, dtype)
    model, spec = reference(folder), spec_of(folder)
    said, beamed = greedy(Whole(model)), beam_and_back(Whole(model, records_past=True))
    for num_stages in NUM_STAGES:
        stages = load_stages(spec, num_stages, NUM_LAYERS)
        assert_equal(greedy(Cut(stages)), said)
        assert_equal(beam_and_back(Cut(stages, records_past=True)), beamed)


@pytest.mark.parametrize("max_cache_len", [0, 20], ids=["a growing KV cache", "a static KV cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_is_exact(family: str, max_cache_len: int, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family, torch.float32)
    cut = Cut(load_stages(spec_of(folder), 2, NUM_LAYERS), max_cache_len=max_cache_len)
    whole = Whole(reference(folder), max_cache_len=max_cache_len)
    assert_equal(*(in_chunks(each, max_cache_len) for each in (cut, whole)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_without_kv_mask_and_positions_is_exact(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, tokens = reference(folder), prompt(2, 11)
    cut = Cut(load_stages(spec_of(folder), 2, NUM_LAYERS), keeps_kv=False)
    assert_equal([cut.step(tokens, None, None)], [Whole(model, keeps_kv=False).step(tokens, None, None)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-350m", "gemma2", "bloom"])
def test_embeddings_instead_of_token_ids_are_exact(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model = reference(folder)
    states = embed(model, prompt(2, 5)).detach()
    mask = torch.ones(2, 5, dtype=torch.long)
    arguments = states, mask, positions_of(mask, 5)
    assert_equal([Cut(load_stages(spec_of(folder), 3, NUM_LAYERS)).step(*arguments)], [Whole(model).step(*arguments)])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "falcon-7b", "gpt2"])
def test_eager_attention_is_exact(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model = reference(folder, attn_implementation="eager")
    stages = load_stages(spec_of(folder, attn_implementation="eager"), 3, NUM_LAYERS)
    assert_equal(greedy(Cut(stages), 4), greedy(Whole(model), 4))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_another_dtype_than_the_checkpoints_is_exact(dtype: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3", torch.bfloat16)
    stages = load_stages(spec_of(folder, dtype=dtype), 2, NUM_LAYERS)
    assert_equal(greedy(Cut(stages), 4), greedy(Whole(reference(folder, dtype=dtype)), 4))


@pytest.mark.parametrize("family", ["mistral", "llama-dynamic"])
def test_a_long_text_is_exact(family: str, checkpoint: Checkpoint) -> None:
    # 9 + 100 tokens: KV buffers double, a sliding window's tokens move to the front, dynamic rotary tables grow.
    folder = checkpoint(family)
    stages = load_stages(spec_of(folder), 2, NUM_LAYERS)
    assert_equal(greedy(Cut(stages), 100), greedy(Whole(reference(folder)), 100))


@pytest.mark.parametrize("window", [1, 2, 6, 9, 10, 60])  # the prompts are of 9 tokens
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen2", "phi3"])
def test_sliding_windows_of_any_width_are_exact(family: str, window: int, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, spec = reference(folder, sliding_window=window), spec_of(folder, sliding_window=window)
    stages = load_stages(spec, 2, NUM_LAYERS)
    if window == 1 and accelerators.chosen != "cpu" and model.config._attn_implementation == "sdpa":
        for conversation in (
            Whole(model),
            Cut(stages),
        ):  # a GPU's attention refuses the mask, of one column for all keys
            with pytest.raises(RuntimeError, match="last dimension must be contiguous"):
                greedy(conversation)
        return
    assert_equal(greedy(Cut(stages)), greedy(Whole(model)))
    assert_equal(
        beam_and_back(Cut(stages, records_past=True)),
        beam_and_back(Whole(model, records_past=True)),
    )
    cut, whole = Cut(stages), Whole(model)
    mask = torch.ones(2, 0, dtype=torch.long)
    for index, num_new in enumerate((4, 9, 3, 20, 1, 2)):  # a prompt in chunks
        mask = extend(mask, num_new)
        arguments = prompt(2, num_new), mask, positions_of(mask, num_new)
        if window == 1 and index:  # transformers' own mask does not fit what it keeps
            for conversation in (whole, cut):
                with pytest.raises(RuntimeError, match="must match the size"):
                    conversation.step(*arguments)
            return
        assert_equal([cut.step(*arguments)], [whole.step(*arguments)])


def test_sessions_do_not_touch_each_other(checkpoint: Checkpoint) -> None:
    folder = checkpoint("mistral")
    model, stages = reference(folder), load_stages(spec_of(folder), 2, NUM_LAYERS)
    alone = [greedy(Whole(model), 3), beam_and_back(Whole(model, records_past=True))]
    first, second = Cut(stages), Cut(stages, records_past=True)
    tokens = prompt(1, 9)
    mask = torch.ones_like(tokens)
    logits = [first.step(tokens, mask, positions_of(mask, 9))]
    assert_equal(beam_and_back(second), alone[1])
    for _ in range(3):
        mask = extend(mask, 1)
        logits.append(first.step(logits[-1][:, -1:].argmax(-1), mask, positions_of(mask, 1), 1))
    assert_equal(logits, alone[0])


def test_only_hidden_states_cross_a_boundary(checkpoint: Checkpoint) -> None:
    # bloom's layers return their attention weights too, [rows, heads, tokens, tokens].
    stage = load_stage(spec_of(checkpoint("bloom")), 0, 2)
    inputs = StageInputs(tensors=(prompt(1, 9),), layout=None, attention_mask=None, position_ids=None)
    output = stage.step(inputs, None)
    assert [tensor.shape for tensor in output.tensors] == [(1, 9, 32)]
    assert output.layout == (True, False)


@pytest.mark.parametrize("head_dim", [6, 10, 18])
def test_heads_of_any_size_are_exact(head_dim: int, tmp_path: Path) -> None:
    torch.manual_seed(head_dim)
    config = tiny_config("llama")
    config.update({"head_dim": head_dim})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    said = greedy(Whole(reference(tmp_path)), 24)
    for num_stages in (1, 2):
        assert_equal(greedy(Cut(load_stages(spec_of(tmp_path), num_stages, NUM_LAYERS)), 24), said)

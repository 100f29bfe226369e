"""Several texts in one pass give each text's logits as it has them alone: every family, cut in two, prompts and tokens mixed.

Alone, a text is run as several equal rows: from how many on a row's bits depend on no other row is found by the stages. Where
they find none, logits differ by rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversations import load_stages, spec_of
from families import FAMILIES, VOCABULARY, reference, rope_config, tiny_model
from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.cutting.parts import find_parts
from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.packed.packed_pass import PackedStage, PassInputs, TextPart
from lingualinked.model.packed.qualifying import why_not_packed

pytestmark = [pytest.mark.equality, pytest.mark.slow]

OWN_ATTENTION = {"bloom", "falcon-7b", "falcon-40b", "falcon-rw", "gptj", "mpt"}
NUM_TOKENS = 4
CHUNK = 5
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05}

Checkpoint = Callable[..., Path]


def texts() -> list[list[int]]:
    """Prompts: within one chunk, of several, beyond sliding windows, of one token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in (3, 11, 7, 1)]


def chunks(prompt: list[int]) -> list[list[int]]:
    return [prompt[at : at + CHUNK] for at in range(0, len(prompt), CHUNK)]


def alone(model: Any, prompt: list[int], num_rows: int) -> list[Tensor]:
    """The last logits of a prompt in chunks, and of greedy tokens after it, of several equal rows."""
    past, logits = None, []
    with torch.inference_mode():
        for chunk in chunks(prompt):
            output = model(torch.tensor([chunk] * num_rows), past_key_values=past, use_cache=True)
            past = output.past_key_values
        for _ in range(NUM_TOKENS):
            logits.append(output.logits[0, -1])
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=past, use_cache=True)
    return logits


def together(
    stages: list[Any], expected: list[list[Tensor]], least_rows: int, max_cache_len: int = 0
) -> list[list[Tensor]]:
    """The same of all texts in one pass each; text n begins with pass 2 n. Greedy tokens are those of the texts alone."""
    packed = [PackedStage(stage) for stage in stages]
    caches = [[stage.new_cache(max_cache_len=max_cache_len) for stage in stages] for _ in expected]
    left = [chunks(prompt) for prompt in texts()]
    said: list[list[Tensor]] = [[] for _ in expected]
    for step in range(2 * len(said) + 2 * NUM_TOKENS):
        live = [place for place in range(len(said)) if step >= 2 * place and len(said[place]) < NUM_TOKENS]
        new = [
            left[place].pop(0) if left[place] else [int(expected[place][len(said[place]) - 1].argmax())]
            for place in live
        ]
        if not live:
            break
        states, layout = torch.tensor([[token for ids in new for token in ids]]), None
        for number, stage in enumerate(packed):
            parts = [TextPart(caches[place][number], len(ids)) for place, ids in zip(live, new, strict=True)]
            output = stage.run(PassInputs(states=states, parts=parts, layout=layout, least_rows=least_rows))
            states, layout = output.tensors[0].clone(), output.layout
        for place, logits in zip(live, states[0], strict=True):
            if not left[place]:
                said[place].append(logits)
    return said


def find_last_layer(stage: Any) -> torch.nn.Module:
    layers: Any = stage.span.model.get_submodule(stage.span.parts.layers)
    return layers[stage.end - 1]  # type: ignore[no-any-return]


def compare(folder: Path, dtype: torch.dtype, max_cache_len: int = 0, **arguments: Any) -> None:
    model, stages = reference(folder, **arguments), load_stages(spec_of(folder, **arguments), 2, 4)
    found = [stage.rounding.independent_rows for stage in stages]
    least_rows = max(2, *found)
    expected = [alone(model, prompt, least_rows) for prompt in texts()]
    said = together(stages, expected, least_rows, max_cache_len)
    tolerance = 0 if all(found) else TOLERANCE[dtype]
    for ours, theirs in zip(said, expected, strict=True):
        assert len(ours) == NUM_TOKENS
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OWN_ATTENTION])
def test_texts_run_together_as_alone(family: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    compare(checkpoint(family, dtype), dtype)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OWN_ATTENTION])
def test_the_last_layer_of_prompts_is_computed_for_rows_with_logits(family: str, checkpoint: Checkpoint) -> None:
    """Passes of prompts, parts of prompts and single tokens have the bits that they have if it is computed for all rows."""
    first, last = load_stages(spec_of(checkpoint(family, torch.bfloat16)), 2, 4)
    said, computed = [], []
    for is_whole in (True, False):
        packed = [PackedStage(first), PackedStage(last)]
        if is_whole:
            packed[1]._last_layer = None
        handle = find_last_layer(last).register_forward_hook(
            lambda _, args, output, to=computed: to.append((args, output))
        )
        generator = torch.Generator().manual_seed(0)
        caches = [[stage.new_cache() for stage in (first, last)] for _ in range(4)]
        for sizes in (
            {0: (40, 1), 1: (7, 1)},
            {0: (1, 1), 2: (33, 0)},
            {1: (1, 1), 2: (25, 3), 3: (30, 1)},
            {3: (20, 0)},
        ):
            num_tokens = sum(num_new for num_new, _ in sizes.values())
            states, layout = torch.randint(3, VOCABULARY, (1, num_tokens), generator=generator), None
            for number, stage in enumerate(packed):
                parts = [TextPart(caches[text][number], *counts) for text, counts in sizes.items()]
                output = stage.run(PassInputs(states=states, parts=parts, layout=layout))
                states, layout = output.tensors[0].clone(), output.layout
            said.append(states)
        handle.remove()
    expected, found = said[: len(said) // 2], said[len(said) // 2 :]
    assert all(map(have_equal_bits, found, expected))
    # without logits, the states are what the layer was given
    args, output = computed[-1]
    unchanged = isinstance(output, Tensor) and torch.equal(output, args[0])
    assert unchanged or not last.rounding.independent_rows or family not in ("llama", "llama-wide", "qwen2", "gemma3")


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "llama-wide", "qwen2"])
def test_with_eager_attention(family: str, checkpoint: Checkpoint) -> None:
    compare(checkpoint(family, torch.bfloat16), torch.bfloat16, attn_implementation="eager")


@pytest.mark.parametrize("family", ["gemma3", "llama-wide", "opt"])
def test_with_a_static_kv_cache(family: str, checkpoint: Checkpoint) -> None:
    """Alone with one that grows: with memory for more, logits differ by rounding."""
    folder = checkpoint(family, torch.float32)
    stages = load_stages(spec_of(folder), 2, 4)
    expected = [alone(reference(folder), prompt, 2) for prompt in texts()]
    for ours, theirs in zip(together(stages, expected, 2, 32), expected, strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_each_text_has_the_rotary_embeddings_of_its_own_length(rope_type: str, tmp_path: Path) -> None:
    """The model's own positions end within the longest text: its embeddings are stretched, and those of the others are not."""
    config = rope_config("llama", rope_type)
    assert config is not None
    config.max_position_embeddings = config.original_max_position_embeddings = 8
    if rope_type == "longrope":
        config.rope_parameters["original_max_position_embeddings"] = 8
    torch.manual_seed(0)
    type(tiny_model("llama", torch.float32))(config).save_pretrained(tmp_path)
    stages = load_stages(spec_of(tmp_path), 2, 4)
    expected = [alone(reference(tmp_path), prompt, 2) for prompt in texts()]  # each with a model that has read no other
    for ours, theirs in zip(together(stages, expected, 2), expected, strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_with_attention_of_their_own_are_found(family: str, checkpoint: Checkpoint) -> None:
    model = tiny_model(family, torch.float32)
    why_not = why_not_packed(model, find_parts(copy.deepcopy(model).to("meta")))
    assert bool(why_not) is (family in OWN_ATTENTION)
    if why_not:
        (stage,) = load_stages(spec_of(checkpoint(family)), 1, 4)
        with pytest.raises(UnsupportedOperationError, match="ForCausalLM"):
            PackedStage(stage)

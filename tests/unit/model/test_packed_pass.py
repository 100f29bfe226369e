"""Texts with one new token each are attended to in one call of a kernel, which gives the bits of each text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_config
from lingualinked.kernels import attention
from lingualinked.model.exact import exact_attention
from lingualinked.model.packed.packed_pass import PackedStage, PassInputs, TextPart
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage

NEW_TOKENS = ((3, 9, 1, 70), (1, 1, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1))
"""Of each text in each pass."""


@pytest.fixture(scope="module")
def stage() -> Stage:
    config = tiny_config("llama")
    config.head_dim = 16
    return Stage.load(
        ModelSpec(
            class_name="LlamaForCausalLM",
            config_json=config.to_json_string(use_diff=False),
            dtype="bfloat16",
            attn_implementation=None,
            load_format="dummy",
            files=(),
        ),
        0,
        4,
    )


def run_passes(stage: Stage) -> list[Tensor]:
    """Return the logits of four texts in passes of prompts and single tokens."""
    generator = torch.Generator().manual_seed(0)
    caches, packed, outputs = [stage.new_cache() for _ in NEW_TOKENS[0]], PackedStage(stage), []
    for new in NEW_TOKENS:
        ids = torch.randint(3, 90, (1, sum(new)), generator=generator)
        parts = [TextPart(cache, count) for cache, count in zip(caches, new, strict=True)]
        outputs.append(packed.run(PassInputs(states=ids, parts=parts)).tensors[0])
    return outputs


@pytest.mark.skipif(not attention.is_available(), reason="this processor does not run the kernel")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_one_call_has_the_bits_of_each_text_alone(
    stage: Stage, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    own = attention.attend_texts

    def counted(*args: Any) -> None:
        counts.append(len(args[3]))
        own(*args)

    monkeypatch.setattr(attention, "attend_texts", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = run_passes(stage)
        if not counts:
            pytest.skip("torch computes attention in another order here")
        monkeypatch.setattr(exact_attention, "uses_kernel_for_texts", lambda *_: False)
        alone = run_passes(stage)
    finally:
        torch.set_num_threads(before)
    assert counts == 4 * [4] + 4 * [3] + 4 * [4]
    assert all(map(torch.equal, together, alone))

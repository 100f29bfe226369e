"""Shapes of real models, for which a GPU chooses other kernels than for tiny ones, give the bits of the uncut model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from families import reference

pytestmark = [pytest.mark.process, pytest.mark.equality]

VOCABULARY = 256
HEADS = {"heads of 64": {"hidden_size": 512}, "heads of 128": {"hidden_size": 1024}}
LENGTHS = (5, 130, 600)
NUM_STEPS = 12


def save(folder: Path, dtype: torch.dtype, **sizes: int) -> str:
    config = LlamaConfig(
        **sizes,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=1408,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def converse(model: Any, ids: torch.Tensor, mask: torch.Tensor, past: Any) -> list[torch.Tensor]:
    """Return the logits of a prompt's last position, and of steps that decode greedily."""
    logits = []
    for _ in range(NUM_STEPS):
        positions = (mask.cumsum(-1) - 1).clamp(0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=past, logits_to_keep=1)
        past = output.past_key_values
        logits.append(output.logits)
        ids = output.logits.argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_wide_heads_at_several_lengths(
    heads: str, dtype: torch.dtype, place: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save(tmp_path, dtype, **HEADS[heads])
    whole, sharded = reference(Path(folder)), place(folder, [("a", 0, 1), ("b", 1, 2)])
    different = []
    for length in LENGTHS:
        for num_rows in (1, 3):
            ids = torch.randint(3, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(length))
            mask = torch.ones_like(ids)
            mask[1:, :3] = 0
            for is_static in (False, True):
                max_cache_len = length + NUM_STEPS
                said = []
                for model in (sharded, whole):
                    past = StaticCache(config=whole.config, max_cache_len=max_cache_len) if is_static else None
                    said.append(converse(model, ids, mask, past))
                steps = [step for step, pair in enumerate(zip(*said, strict=True)) if not torch.equal(*pair)]
                if steps:
                    kind = "static" if is_static else "growing"
                    different.append(f"{num_rows} x {length}, {kind} KV, steps {steps}")
    assert different == []

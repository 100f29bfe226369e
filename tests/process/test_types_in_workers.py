"""Small copies of 20 model types, one or two for each kind of state and of what crosses boundaries, in real workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from architectures import default_config, spec_of_config
from lingualinked.model.proving.small_model import make_small_model, prompt

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TYPES = (
    "bamba ctrl dbrx deepseek_v3 deepseek_v4 dots3_note_text falcon_h1 gemma3n_text gemma4_text glm_moe_dsa gpt_oss inkling2_text "
    "jamba lfm2_moe longcat_flash mamba2 minimax_m2 qwen3_next recurrent_gemma zamba2"
).split()


@pytest.mark.parametrize("every_type", TYPES)
def test_tokens_and_logits_are_equal(every_type: str, shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    config = default_config(every_type)
    small = make_small_model(config, spec_of_config(config, "float32"), tmp_path)
    folder = str(Path(small.spec.files[0].path).parent)
    tokens = prompt(2, 9, small.vocabulary)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    expected = say(small.whole, tokens, mask)
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan="even", progress=False) as model:
        found = say(model, tokens, mask)
    assert [name for name, each in expected.items() if not torch.equal(found[name], each)] == []


@torch.no_grad()
def say(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give logits of a prompt, and the tokens of a padded batch, greedily and by beams."""
    arguments = {
        "input_ids": tokens,
        "attention_mask": mask,
        "max_new_tokens": 6,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return {
        "logits": model(input_ids=tokens[1:]).logits,
        "greedy": model.generate(**arguments),
        "one row": model.generate(tokens[1:], max_new_tokens=6, eos_token_id=None, pad_token_id=0),
    }

"""State that modules keep between forward passes, apart from the KV cache, is known, and new stages receive it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conversations import spec_of
from families import FAMILIES, ROPE_TYPES, reference, rope_config, save_tiny, tiny_config
from lingualinked.model.stages.rotary import RopeReach
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs

LENGTHS = (9, 100, 70, 80, 9, 70, 130, 64, 63, 66)  # the models have 64 positions

# Rotary embeddings alone keep anything. Of "longrope" every pass makes anew what it needs, and another pass's constant;
# of "dynamic" all follows from the length of text that it is stretched for, which every step tells.
KNOWN = {
    "longrope": {"inv_freq", "long_inv_freq"},
    "dynamic": {"inv_freq", "max_seq_len_cached", "attention_scaling"},
}


def kept(model: nn.Module) -> dict[tuple[str, str], object]:
    """Everything that modules hold, parameters aside: buffers and plain attributes."""
    held: dict[tuple[str, str], object] = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            if name not in ("_parameters", "_buffers", "_modules", "config"):
                held[path, name] = value.clone() if isinstance(value, Tensor) else repr(value)
    return held


def same(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return type(left) is type(right) and left == right


CASES = [(family, kind) for family in FAMILIES for kind in ROPE_TYPES if rope_config(family, kind) is not None]
CASES += [(family, "") for family in FAMILIES if rope_config(family, "default") is None]


@pytest.mark.parametrize(("family", "rope_type"), CASES)
def test_whatever_a_pass_changes_is_known(family: str, rope_type: str) -> None:
    config = rope_config(family, rope_type) or tiny_config(family)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    known = KNOWN.get(rope_type, set())
    before = kept(model)
    changed = set()
    for length in (9, 100, 70, 9) if rope_type else (9, 60, 3):
        with torch.no_grad():
            model(torch.arange(length)[None] % 90 + 3)
        after = kept(model)
        changed |= {each for each in before.keys() | after.keys() if not same(before.get(each), after.get(each))}
        before = after
    for path, name in changed:
        assert path.endswith("rotary_emb")
        assert any(name.removesuffix(each) in ("", "full_attention_", "sliding_attention_") for each in known), name


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon-7b", "gpt-neox", "qwen3"])
def test_stages_loaded_anew_before_every_text(family: str, rope_type: str, tmp_path: Path) -> None:
    folder = save_tiny(family, torch.float32, tmp_path)
    config = rope_config(family, rope_type)
    assert config is not None
    config.save_pretrained(folder)
    spec, whole = spec_of(folder), reference(folder)
    reach = RopeReach(spec)
    old = Stage.load(spec, 0, 2)  # it has seen some of the texts, and shares its layers with new ones
    for index, length in enumerate(LENGTHS):
        tokens = torch.arange(length)[None] % 90 + 3
        first = Stage.load(spec, 0, 2, shared=[old]) if index % 3 else old
        states, before = (tokens,), reach.advance(length)
        layout = None
        for stage in (first, Stage.load(spec, 2, 4)):
            inputs = StageInputs(
                tensors=states, layout=layout, attention_mask=None, position_ids=None, rope_reach=before
            )
            output = stage.step(inputs, None)
            states, layout = output.tensors, output.layout
        with torch.no_grad():
            assert torch.equal(states[0], whole(tokens, use_cache=False).logits), length

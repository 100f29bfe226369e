"""A stage finds out by itself whether its texts' bits depend on other texts, and says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from lingualinked.model.hf_internals import computing
from lingualinked.model.packed import invariance
from lingualinked.model.packed.invariance import probe_invariance
from lingualinked.model.packed.packed_pass import PackedStage, PassInputs, TextPart
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def load(config: PreTrainedConfig, start: int, end: int, dtype: str = "bfloat16") -> Stage:
    config.dtype = getattr(torch, dtype)
    return Stage.load(
        ModelSpec(
            class_name=config.architectures[0],  # type: ignore[index]
            config_json=config.to_json_string(use_diff=False),
            dtype=dtype,
            attn_implementation=None,
            load_format="dummy",
            files=(),
        ),
        start,
        end,
    )


def llama(start: int = 0, end: int = 3, dtype: str = "bfloat16") -> Stage:
    return load(LlamaConfig(**_SIZES, architectures=["LlamaForCausalLM"]), start, end, dtype)


@pytest.mark.parametrize("span", [(0, 2), (2, 3)])
def test_a_stage_that_is_called_invariant_is(span: tuple[int, int]) -> None:
    stage = llama(*span)
    found = probe_invariance(stage)
    assert found.fingerprint
    if found.because:
        assert "batch_invariant" in found.because
        pytest.skip("a text's bits depend on others here")
    generator = torch.Generator().manual_seed(9)
    sizes = (3, 1, 29, 6)
    states = [
        torch.randint(96, (1, size), generator=generator)
        if stage.is_first
        else torch.randn((1, size, 64), generator=generator).to(torch.bfloat16)
        for size in sizes
    ]

    def run(*places: int) -> list[Tensor]:
        parts = [TextPart(stage.new_cache(), sizes[place], sizes[place]) for place in places]
        inputs = PassInputs(states=torch.cat([states[place] for place in places], 1), parts=parts, is_invariant=True)
        outputs = PackedStage(stage).run(inputs).tensors[0].split([sizes[place] for place in places], 1)
        return [each.clone() for each in outputs]

    together = run(2, 0, 3, 1)
    for place, output in zip((2, 0, 3, 1), together, strict=True):
        assert torch.equal(run(place)[0], output), place


def test_a_layer_that_looks_at_other_texts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = llama()
    monkeypatch.setattr(invariance, "_why_products_vary", lambda _stage: "")
    [norm, *_] = [each for name, each in stage.span.model.named_modules() if name.endswith("input_layernorm")]
    norm.register_forward_hook(lambda _module, _args, output: output + output.mean())
    assert "give a text other bits among others than alone" in probe_invariance(stage).because


def test_what_is_not_promised_in_float32_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariance, "has_free_products", lambda *_: False)
    assert "dtype=torch.bfloat16" in probe_invariance(llama(dtype="float32")).because


def test_experts_never_multiply_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[list[int]] = []
    own = computing.moe._grouped_mm

    def counted(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        numbers.append(torch.diff(offs, prepend=offs.new_zeros(1)).tolist())
        return own(rows, weight, offs=offs)

    monkeypatch.setattr(computing.moe, "_grouped_mm", counted)
    sizes = {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    stage = load(MixtralConfig(**sizes, architectures=["MixtralForCausalLM"]), 0, 3)
    inputs = PassInputs(states=torch.arange(5)[None], parts=[TextPart(stage.new_cache(), 5, 5)])
    found = PackedStage(stage).run(inputs)
    assert numbers
    assert all(1 not in each for each in numbers)
    assert found.tensors[0].shape == (1, 5, 96)


def test_pairs_give_each_row_its_expert() -> None:
    rows, weight = torch.randn(6, 8), torch.randn(4, 8, 16)
    offs = torch.tensor([1, 1, 4, 5], dtype=torch.int32)
    expected = torch.stack([row @ weight[expert] for row, expert in zip(rows, (0, 2, 2, 2, 3), strict=False)])
    with computing.experts_in_pairs():
        found = computing.moe._grouped_mm(rows, weight, offs=offs)
    assert torch.allclose(found[:5], expected, atol=1e-5)
    assert found.shape == (6, 16)


def test_linear_layers_are_found() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(5, 2, bias=False))
    assert set(invariance._find_products(model)) == {(4, 3, True), (5, 2, False)}

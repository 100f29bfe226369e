"""The adapters of a stage are put in place once for all stages that share a layer, and removed; what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lingualinked.errors import ArgumentError
from lingualinked.model.adapters.adapter_data import AdaptedModule, Adapter, AdapterUse
from lingualinked.model.adapters.stage_adapters import StageAdapters, find_base
from lingualinked.model.cutting.cut import Boundary, PassThrough

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
PATH = "model.layers.1.mlp.up_proj"
IDS = torch.tensor([[1, 5, 7], [2, 6, 8]])
CPU = torch.device("cpu")


def adapter(name: str = "a", number: int = 1, path: str = PATH) -> Adapter:
    tensors = (f"lora_A.{name}.weight", f"lora_B.{name}.weight")
    return Adapter(name, number, (AdaptedModule(path, 2, 0.5, False, False, tensors),))


def matrices(value: float = 1.0) -> list[torch.Tensor]:
    return [torch.full((2, 16), value), torch.full((24, 2), value)]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval().requires_grad_(False)


def run(model: Any, adapters: StageAdapters, use: AdapterUse | None) -> torch.Tensor:
    with torch.inference_mode(), adapters.used(use):
        logits: torch.Tensor = model(IDS).logits
        return logits


def test_an_adapter_computes_as_written_and_only_where_it_is_active(model: Any) -> None:
    plain, weight = model(IDS).logits, model.get_submodule(PATH).weight
    adapters = StageAdapters(model, CPU)
    adapters.add(adapter(), matrices())
    assert find_base(PATH, model.get_submodule(PATH))[1].weight is weight
    assert adapters
    assert adapters.num_bytes == (2 * 16 + 24 * 2) * 4
    active = run(model, adapters, AdapterUse(("a",)))
    assert torch.equal(run(model, adapters, None), plain)
    assert torch.equal(run(model, adapters, AdapterUse(("a",), is_disabled=True)), plain)
    assert torch.equal(run(model, adapters, AdapterUse(("unknown",))), plain)
    mixed = run(model, adapters, AdapterUse((), ("a", "__base__")))
    assert not torch.equal(active, plain)
    assert torch.allclose(mixed, torch.stack([active[0], plain[1]]), atol=1e-5)
    adapters.remove("a")
    adapters.remove("a")
    assert not adapters
    assert torch.equal(run(model, adapters, AdapterUse(("a",))), plain)


def test_what_another_stage_has_put_into_a_shared_layer_stays(model: Any) -> None:
    first = StageAdapters(model, CPU)
    first.add(adapter(), matrices())
    tensor = model.get_submodule(PATH).lora_A["a"].weight
    other = StageAdapters(model, CPU)
    other.add(adapter(), matrices(2.0))  # of the same number
    assert model.get_submodule(PATH).lora_A["a"].weight is tensor
    other.add(adapter(number=2), matrices(2.0))
    assert model.get_submodule(PATH).lora_A["a"].weight[0, 0] == 2.0
    first.add(adapter("b", number=3), matrices(3.0))
    assert type(model.get_submodule(PATH).base_layer) is nn.Linear  # wrapped once
    first.remove("a")
    other.remove("a")
    assert list(model.get_submodule(PATH).lora_A) == ["b"]


@pytest.mark.parametrize(
    ("path", "tensors", "reason"),
    [
        (
            "model.layers.5.mlp.up_proj",
            matrices(),
            "changes 'model.layers.5.mlp.up_proj', which this stage does not hold",
        ),
        ("lm_head", matrices(), "changes 'lm_head', which this stage does not hold"),
        ("model.norm", matrices(), "peft can't put adapter 'a' into this stage"),
        (PATH, matrices()[:1], "arrived with 1 tensor, which are not those of its modules"),
        (PATH, matrices()[::-1], r"lora_A.a.weight of adapter 'a' at .* has the shape \[24, 2\], .* needs \[2, 16\]"),
    ],
)
def test_what_does_not_fit_is_refused(model: Any, path: str, tensors: list[torch.Tensor], reason: str) -> None:
    model.lm_head = PassThrough(Boundary(), model.lm_head)
    with pytest.raises(ArgumentError, match=reason):
        StageAdapters(model, CPU).add(adapter(path=path), tensors)

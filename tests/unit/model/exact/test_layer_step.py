"""Layers whose steps are one call have the layer's own bits and KV, and are left as they are where anything else is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversations import Cut, dummy_spec, load_stages
from lingualinked.kernels import few_rows, sequence
from lingualinked.model.exact import layer_step
from lingualinked.model.exact.layer_program import LayerProgram
from lingualinked.model.stages.stage import Stage

pytestmark = pytest.mark.skipif(
    not (few_rows.is_available() and sequence.is_available()), reason="this processor does not run the kernels"
)

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of kernels."""
    rows: list[int] = []
    own = LayerProgram.run

    def run(self: LayerProgram, states: Tensor, *args: Any) -> Tensor | None:
        rows.append(len(states))
        return own(self, states, *args)

    monkeypatch.setattr(LayerProgram, "run", run)
    return rows


def stages_of(family: str) -> list[Stage]:
    return load_stages(dummy_spec(family, "bfloat16", **SIZES), 1, 4)


def talk(stages: list[Stage], num_rows: int, num_steps: int = 8) -> list[Tensor]:
    cut, generator = Cut(stages), torch.Generator().manual_seed(0)
    logits = [cut.step(torch.randint(3, 90, (num_rows, 5), generator=generator), None, None)]
    logits += [cut.step(torch.randint(3, 90, (num_rows, 1), generator=generator), None, None) for _ in range(num_steps)]
    held = [
        each
        for cache in cut.caches
        if cache is not None
        for layer in cache.owned.values()
        for each in layer.read_tokens(layer.first, layer.stop - layer.first)
    ]
    return [*logits, *(each.clone() for each in held)]


def own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_step, "_is_step", lambda *_: False)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(
        torch.equal(each.view(torch.int16), other.view(torch.int16))
        for each, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_and_kv_are_the_layers_own(
    family: str, num_rows: int, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = stages_of(family)
    found = talk(stages, num_rows)
    assert set(runs) <= {num_rows}
    if family == "llama":
        assert len(runs) == 4 * (8 - 2)  # layers; all steps but the two that show what they call
    own_layers(monkeypatch)
    assert_equal(found, talk(stages, num_rows))


def test_hooks_see_what_the_layer_calls(runs: list[int]) -> None:
    stages = stages_of("llama")
    talk(stages, 1)
    runs.clear()
    seen: list[object] = []
    norm: nn.Module = stages[0]._layers[1].post_attention_layernorm
    hook = norm.register_forward_hook(lambda *_: seen.append(1))
    talk(stages, 1)
    assert len(seen) == 9
    assert len(runs) == 3 * 8  # of the other layers
    hook.remove()


def test_other_weights_are_used(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stages = stages_of("llama")
    before = talk(stages, 2)
    layer = stages[0]._layers[0]
    layer.mlp.down_proj.repack(2 * layer.mlp.down_proj.unpacked())
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(-2)
    found = talk(stages, 2)
    assert runs
    own_layers(monkeypatch)
    assert_equal(found, talk(stages, 2))
    assert not torch.equal(before[-1], found[-1])


def test_so_are_other_tensors_in_place_of_weights(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stages = stages_of("llama")
    talk(stages, 2)
    norm: nn.Module = stages[0]._layers[0].input_layernorm
    norm.weight = nn.Parameter(-2 * norm.get_parameter("weight").detach(), requires_grad=False)
    found = talk(stages, 2)
    assert runs
    own_layers(monkeypatch)
    assert_equal(found, talk(stages, 2))


def test_a_program_with_other_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerProgram, "run", lambda _self, states, *_: states.clone())
    stages = stages_of("llama")
    found = talk(stages, 2)
    monkeypatch.undo()
    own_layers(monkeypatch)
    assert_equal(found, talk(stages, 2))


@pytest.mark.parametrize("first_at", [0, 2, 4, 6])
def test_what_is_not_finite_is_computed_by_the_layer(first_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, own, count = stages_of("llama"), LayerProgram.run, 0

    def run(self: LayerProgram, *args: Any) -> Tensor | None:
        nonlocal count
        count += 1
        result = own(self, *args)
        return None if count > first_at else result

    monkeypatch.setattr(LayerProgram, "run", run)
    found = talk(stages, 2)
    monkeypatch.undo()
    own_layers(monkeypatch)
    assert_equal(found, talk(stages, 2))

"""Interventions of pyvene have on a sharded model the effect that they have on the uncut one, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from process.libraries.conftest import Compare

pyvene = pytest.importorskip("pyvene")

pytestmark = [pytest.mark.process, pytest.mark.equality]

BASE, SOURCE = ({"input_ids": torch.tensor([ids])} for ids in ([1, 17, 93, 54, 8], [1, 27, 13, 44, 9]))
ADDED = torch.linspace(-1, 1, 32)


def intervenable(model: Any, *representations: dict[str, Any]) -> Any:
    return pyvene.IntervenableModel(pyvene.IntervenableConfig(list(representations)), model=model)


@torch.no_grad()
@pytest.mark.parametrize(
    "component", ["block_input", "block_output", "mlp_activation", "attention_output", "query_output"]
)
def test_activations_of_another_input_are_patched_in(compare: Compare, component: str) -> None:
    def script(model: Any) -> Any:
        patched = intervenable(
            model, {"layer": 1, "component": component, "intervention_type": pyvene.VanillaIntervention}
        )
        original, counterfactual = patched(BASE, [SOURCE], {"sources->base": 3}, output_original_output=True)
        return original.logits, counterfactual.logits, model(**BASE).logits

    compare(script)


@torch.no_grad()
def test_heads_and_several_layers_are_patched(compare: Compare) -> None:
    def script(model: Any) -> Any:
        heads = intervenable(
            model,
            {
                "layer": 1,
                "component": "head_attention_value_output",
                "unit": "h",
                "intervention_type": pyvene.VanillaIntervention,
            },
        )
        layers = intervenable(
            model,
            *(
                {"layer": layer, "component": "mlp_output", "intervention_type": pyvene.VanillaIntervention}
                for layer in (0, 2)
            ),
        )
        locations = {"sources->base": ([[[3]], [[2]]], [[[3]], [[2]]])}
        return [
            heads(BASE, [SOURCE], {"sources->base": 2})[1].logits,
            layers(BASE, [SOURCE, SOURCE], locations)[1].logits,
        ]

    compare(script)


@torch.no_grad()
def test_activations_are_ablated_steered_and_collected(compare: Compare) -> None:
    def script(model: Any) -> Any:
        zeroed = intervenable(
            model, {"layer": 1, "component": "mlp_output", "intervention_type": pyvene.ZeroIntervention}
        )
        steered = intervenable(
            model,
            {
                "layer": 2,
                "component": "block_output",
                "intervention_type": pyvene.AdditionIntervention,
                "source_representation": ADDED,
            },
        )
        collected = intervenable(
            model, {"layer": 2, "component": "block_output", "intervention_type": pyvene.CollectIntervention}
        )
        return [
            zeroed(BASE, unit_locations={"base": 2})[1].logits,
            steered(BASE, unit_locations={"base": [0, 1, 2, 3, 4]})[1].logits,
            collected(BASE, unit_locations={"base": [1, 3]})[0][-1],
        ]

    compare(script)


@torch.no_grad()
def test_a_function_changes_a_module_that_is_named_by_its_path(compare: Compare) -> None:
    def script(model: Any) -> Any:
        halved = pyvene.IntervenableModel(
            {"component": "model.layers[2].mlp.output", "intervention": lambda base, source: base * 0.5}, model=model
        )
        return halved(BASE)[1].logits

    compare(script)


@torch.no_grad()
def test_a_rotated_subspace_is_patched(compare: Compare) -> None:
    def script(model: Any) -> Any:
        torch.manual_seed(0)
        rotated = intervenable(
            model,
            {
                "layer": 1,
                "component": "block_output",
                "low_rank_dimension": 4,
                "intervention_type": pyvene.LowRankRotatedSpaceIntervention,
            },
        )
        return rotated(BASE, [SOURCE], {"sources->base": 3})[1].logits

    compare(script)


def test_a_rotation_is_trained(compare: Compare) -> None:
    def script(model: Any) -> Any:
        torch.manual_seed(0)
        rotated = intervenable(
            model,
            {
                "layer": 1,
                "component": "block_output",
                "low_rank_dimension": 4,
                "intervention_type": pyvene.LowRankRotatedSpaceIntervention,
            },
        )
        rotated(BASE, [SOURCE], {"sources->base": 3})[1].logits.sum().backward()
        return [parameter.grad for parameter in rotated.get_trainable_parameters()]

    compare(script)


@torch.no_grad()
def test_what_is_generated_is_steered(compare: Compare) -> None:
    def script(model: Any) -> Any:
        steered = intervenable(
            model,
            {
                "layer": 2,
                "component": "mlp_output",
                "intervention_type": pyvene.AdditionIntervention,
                "source_representation": ADDED,
            },
        )
        return steered.generate(BASE, unit_locations=None, intervene_on_prompt=True, max_new_tokens=4, do_sample=False)

    compare(script)

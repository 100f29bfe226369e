from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from families import tiny_config
from lingualinked.errors import ProtocolError
from lingualinked.model.autograd_graph import AutogradGraph
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stage import Stage
from lingualinked.model.stage_data import StageInputs


def small_graph(*, weight: Tensor | None = None) -> AutogradGraph:
    """The graph of a product of two inputs with a weight, of which the second one's gradient is not asked for."""
    graph = AutogradGraph((True, False))
    first, second = graph.begin((torch.ones(2, 3), torch.full((2, 3), 2.0)))
    weight = torch.full((3, 3), 3.0) if weight is None else weight
    outputs = (first * second) @ weight
    graph.end((outputs, second), [weight])
    return graph


def test_gradients_lead_from_outputs_to_inputs() -> None:
    graph = small_graph()
    assert graph.outputs_require_grad == (True, False)
    first, second = graph.run((torch.ones(2, 3), None), keeps_graph=False)
    assert second is None
    assert first is not None
    assert torch.equal(first, torch.full((2, 3), 18.0))


def test_outputs_are_given_without_the_graph() -> None:
    graph = AutogradGraph((True,))
    [states] = graph.begin((torch.ones(2),))
    [output] = graph.end((states * 2,), [])
    assert not output.requires_grad


def test_an_input_may_be_changed_in_place() -> None:
    graph = AutogradGraph((True,))
    [states] = graph.begin((torch.ones(2),))
    states.mul_(3)
    graph.end((states,), [])
    [gradient] = graph.run((torch.ones(2),), keeps_graph=False)
    assert gradient is not None
    assert gradient.tolist() == [3, 3]


def test_a_graph_serves_again_only_if_it_is_kept() -> None:
    graph = small_graph()
    graph.run((torch.ones(2, 3), None), keeps_graph=True)
    graph.run((torch.ones(2, 3), None), keeps_graph=False)
    with pytest.raises(RuntimeError, match="a second time"):
        graph.run((torch.ones(2, 3), None), keeps_graph=False)


@pytest.mark.parametrize(
    "gradients",
    [(torch.ones(2, 3),), (torch.ones(3, 2), None), (torch.ones(2, 3).double(), None)],
    ids=["too few", "another shape", "another dtype"],
)
def test_gradients_of_other_tensors_are_refused(gradients: tuple[Tensor | None, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"gradient.* arrived of"):
        small_graph().run(gradients, keeps_graph=False)


def test_other_inputs_than_announced_are_refused() -> None:
    with pytest.raises(ProtocolError, match="1 input arrived, and 2"):
        AutogradGraph((True, False)).begin((torch.ones(1),))


def test_what_a_graph_keeps_is_counted_without_weights() -> None:
    weight = torch.full((3, 3), 3.0)
    # The second factor, and what the product of both becomes once it is needed for the weight's gradient: not here.
    assert small_graph(weight=weight).num_bytes == 2 * 3 * 4


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec(
        class_name="LlamaForCausalLM",
        config_json=tiny_config("llama").to_json_string(use_diff=False),
        dtype="float32",
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )


def test_a_stage_with_kv_from_steps_without_gradients(spec: ModelSpec) -> None:
    """What was allocated in inference mode is read in a graph, and steps without gradients go on behind it."""
    stage = Stage.load(spec, 1, 3)
    cache = stage.new_cache()
    states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))

    def step(part: Tensor, graph: AutogradGraph | None = None) -> Tensor:
        inputs = StageInputs(tensors=(part,), layout=None, attention_mask=None, position_ids=None, graph=graph)
        return stage.step(inputs, cache).tensors[0]

    graph = AutogradGraph((True,))
    parts = [step(states[:, :3]), step(states[:, 3:8], graph), step(states[:, 8:])]
    whole = stage.step(
        StageInputs(tensors=(states,), layout=None, attention_mask=None, position_ids=None), stage.new_cache()
    ).tensors[0]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    [gradient] = graph.run((torch.ones(2, 5, 32),), keeps_graph=False)
    assert gradient is not None
    assert gradient.isfinite().all()
    assert not any(parameter.requires_grad for parameter in nn.Module.parameters(stage._model))

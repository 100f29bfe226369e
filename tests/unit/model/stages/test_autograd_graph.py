from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from families import tiny_config
from lingualinked.errors import ProtocolError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.autograd_graph import AutogradGraph, Gradients, Returned
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs


def run(graph: AutogradGraph, gradients: Gradients, *, tap: int | None = None, keeps_graph: bool = False) -> Gradients:
    """Run a backward pass through a graph without hooks."""
    return graph.run(tap, gradients, keeps_graph=keeps_graph, reach_tap=lambda *_: ((), ()))


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
    first, second = run(graph, (torch.ones(2, 3), None))
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
    [gradient] = run(graph, (torch.ones(2),))
    assert gradient is not None
    assert gradient.tolist() == [3, 3]


def test_a_graph_serves_again_only_if_it_is_kept() -> None:
    graph = small_graph()
    run(graph, (torch.ones(2, 3), None), keeps_graph=True)
    run(graph, (torch.ones(2, 3), None))
    with pytest.raises(RuntimeError, match="a second time"):
        run(graph, (torch.ones(2, 3), None))


@pytest.mark.parametrize(
    "gradients",
    [(torch.ones(2, 3),), (torch.ones(3, 2), None), (torch.ones(2, 3).double(), None)],
    ids=["too few", "another shape", "another dtype"],
)
def test_gradients_of_other_tensors_are_refused(gradients: tuple[Tensor | None, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"gradient.* arrived of"):
        run(small_graph(), gradients)


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
    [gradient] = run(graph, (torch.ones(2, 5, 32),))
    assert gradient is not None
    assert gradient.isfinite().all()
    weights = list(nn.Module.parameters(stage._model))
    assert all(weight.grad is None for weight in weights)
    assert all(weight.requires_grad for weight in weights)  # again: it determines the bits of other steps


def test_a_pass_stops_where_hooks_have_run() -> None:
    """The gradient of what they returned comes out, and that of what they were given goes in."""
    graph = AutogradGraph((True,))
    [states] = graph.begin((torch.ones(2),))
    states = states * 2
    given, version = states, states._version
    kept, other = graph.pass_hooks([states], [], [Returned(0, None), Returned(None, torch.ones(2))])
    assert kept is given
    assert kept._version == version
    graph.end((kept * 3 + other * 5,), [])
    stops: list[tuple[int, list[list[float] | None]]] = []

    def reach(tap: int, gradients: Gradients) -> tuple[Gradients, Gradients]:
        stops.append((tap, [None if each is None else each.tolist() for each in gradients]))
        return (torch.full((2,), 7.0),), ()

    [gradient] = graph.run(None, (torch.ones(2),), keeps_graph=True, reach_tap=reach)
    assert stops == [(0, [[3, 3], [5, 5]])]
    assert gradient is not None
    assert gradient.tolist() == [14, 14]
    [gradient] = run(graph, (torch.ones(2),), tap=0)
    assert gradient is not None
    assert gradient.tolist() == [2, 2]


def test_hooks_are_passed_though_nothing_leads_through_them() -> None:
    """What by-passes them is cut from what is in front of them, as in the caller's own graph."""
    graph = AutogradGraph((True,))
    [states] = graph.begin((torch.ones(2),))
    states = states * 2
    graph.pass_hooks([states * 3], [], [])
    graph.end((states,), [])
    stops = []

    def reach(tap: int, gradients: Gradients) -> tuple[Gradients, Gradients]:
        stops.append((tap, gradients))
        return (None,), ()

    [gradient] = graph.run(None, (torch.ones(2),), keeps_graph=False, reach_tap=reach)
    assert stops == [(0, ())]
    assert gradient is not None
    assert gradient.tolist() == [2, 2]


def test_a_view_is_replaced_and_what_is_changed_stays_the_same_tensor() -> None:
    graph = AutogradGraph((True,))
    [states] = graph.begin((torch.ones(4),))
    part, whole = states[1:], torch.zeros(4)
    new_part, new_whole = graph.pass_hooks(
        [part], [whole], [Returned(0, None, is_view=True), Returned(1, torch.ones(4))]
    )
    assert new_part is not part
    assert new_whole is whole
    assert whole.tolist() == [1, 1, 1, 1]
    graph.end((new_part.sum() * whole,), [])
    assert graph.outputs_require_grad == (True,)

"""Layers that are taken out of the model's list: the workers skip them, and what comes out is what the unsharded model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17]])
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
ORIGINAL: dict[int, list[Any]] = {}
FAMILIES = {"llama-wide": torch.bfloat16, "gemma2": torch.float32, "bloom": torch.float32}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """A model in three stages, and the unsharded one."""
    folder = save_tiny(request.param, FAMILIES[request.param], tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        unsharded = reference(folder)
        unsharded(IDS, output_hidden_states=True)  # transformers makes layers record that are there the first time
        ORIGINAL.update({id(model): list(layers_of(model)) for model in (sharded, unsharded)})
        yield sharded, unsharded


@pytest.fixture(autouse=True)
def put_back(pair: tuple[Any, Any]) -> Iterator[None]:
    """Give both models all their layers again."""
    yield
    for model in pair:
        for index, layer in enumerate(ORIGINAL[id(model)]):
            layers = layers_of(model)
            if index < len(layers) and type(layers[index]) in (nn.Identity, Passing):
                layers[index] = layer
            elif index >= len(layers) or layers[index] is not layer:
                layers.insert(index, layer)
    assert_same(pair)


def decoder_of(model: Any) -> Any:
    return model.base_model


def layers_of(model: Any) -> Any:
    return decoder_of(model).layers if hasattr(decoder_of(model), "layers") else decoder_of(model).h


def set_layers(model: Any, layers: Any) -> None:
    setattr(decoder_of(model), "layers" if hasattr(decoder_of(model), "layers") else "h", layers)


@torch.no_grad()
def assert_same(pair: tuple[Any, Any]) -> None:
    ours, theirs = (model(IDS, output_hidden_states=True) for model in pair)
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    for _ in range(2):
        steps = [step_or_error(model, each.past_key_values) for model, each in zip(pair, (ours, theirs), strict=True)]
        assert torch.equal(*steps)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "delete": lambda model: layers_of(model).__delitem__(2),
    "delete one of the first stage": lambda model: layers_of(model).__delitem__(0),
    "delete one of the last stage": lambda model: layers_of(model).__delitem__(3),
    "delete a stage": lambda model: layers_of(model).__delitem__(slice(1, 3)),
    "delete all before the last stage": lambda model: layers_of(model).__delitem__(slice(0, 3)),
    "keep the first": lambda model: set_layers(model, layers_of(model)[:1]),
    "every other": lambda model: set_layers(model, nn.ModuleList(list(layers_of(model))[1::2])),
    "pop": lambda model: layers_of(model).pop(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_the_list(pair: tuple[Any, Any], change: Callable[[Any], Any]) -> None:
    for model in pair:
        change(model)
    assert len(layers_of(pair[0])) == len(layers_of(pair[1])) < 4
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    assert_same(pair)


@torch.no_grad()
def test_an_identity_leaves_the_others_in_their_places(pair: tuple[Any, Any]) -> None:
    sharded, unsharded = pair
    for index in range(4):
        layers_of(sharded)[index] = nn.Identity()
        layer = layers_of(unsharded)[index]
        layers_of(unsharded)[index] = Passing(returns_tuple=unsharded.config.model_type == "bloom")
        assert torch.equal(sharded(IDS).logits, unsharded(IDS).logits)
        layers_of(unsharded)[index] = layer
        layers_of(sharded)[index] = ORIGINAL[id(sharded)][index]


class Passing(nn.Module):
    """What nn.Identity would be if it took the arguments of a layer."""

    def __init__(self, *, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (states,) if self.returns_tuple else states


REFUSED: dict[str, Callable[[Any], Any]] = {
    "another module": lambda model: layers_of(model).__setitem__(1, nn.Linear(2, 2)),
    "another order": lambda model: set_layers(model, nn.ModuleList(list(layers_of(model))[::-1])),
    "twice the same": lambda model: layers_of(model).append(layers_of(model)[0]),
    "nothing": lambda model: layers_of(model).__delitem__(slice(None)),
    "one too many": lambda model: layers_of(model).append(nn.Identity()),
    "by name": lambda model: delattr(layers_of(model), "1"),
}


def test_other_changes_are_refused_by_name(pair: tuple[Any, Any]) -> None:
    for change in REFUSED.values():
        with pytest.raises(ll.UnsupportedOperationError, match="of a sharded model: "):
            change(pair[0])
    whole = layers_of(pair[0])
    set_layers(pair[0], whole[:2])
    with pytest.raises(ll.UnsupportedOperationError, match="has been replaced by another one"):
        del whole[0]
    layers_of(pair[0])[0] = nn.Identity()
    with pytest.raises(ll.UnsupportedOperationError, match="delete the layer instead"):
        pair[0](IDS, output_hidden_states=True)


@torch.no_grad()
def test_a_block_and_sessions_that_move(pair: tuple[Any, Any]) -> None:
    sharded, unsharded = pair
    past = sharded(IDS).past_key_values
    spans = [("c", 0, 2), ("a", 2, 4)]
    with sharded.skip_layers(3):
        del layers_of(unsharded)[3]
        assert past.made_before_edit
        begun = [model(IDS).past_key_values for model in pair]
        sharded.rebalance(ll.Plan.from_spans(spans))
        logits = [model(IDS[:, :1], past_key_values=each).logits for model, each in zip(pair, begun, strict=True)]
        assert torch.equal(*logits)
    layers_of(unsharded).append(ORIGINAL[id(unsharded)][3])
    assert_same(pair)
    with pytest.warns(ll.StaleKVWarning):
        outcomes = [step_or_error(model, each) for model, each in zip(pair, begun, strict=True)]
    assert torch.equal(*outcomes)
    sharded.rebalance(ll.Plan.from_spans(SPANS))
    outcomes = [step_or_error(model, each) for model, each in zip(pair, begun, strict=True)]
    assert torch.equal(*outcomes)


def step_or_error(model: Any, past: Any) -> torch.Tensor:
    """Run a step; return an empty tensor if it fails, as it may where a layer has KV of fewer tokens than others."""
    try:
        logits: torch.Tensor = model(IDS[:, :1], past_key_values=past).logits
    except (RuntimeError, ll.WorkerError, ll.ClosedError):
        return torch.empty(0)
    return logits


@torch.no_grad()
def test_hooks_are_called_at_the_layers_that_run(pair: tuple[Any, Any]) -> None:
    called: list[list[Any]] = [[], []]
    for model, calls in zip(pair, called, strict=True):
        layers = list(layers_of(model))
        handles = [
            layer.register_forward_hook(
                lambda _, args, output, index=index, calls=calls: calls.append((index, args[0]))
            )
            for index, layer in enumerate(layers)
        ]
        del layers_of(model)[1]
        model(IDS)
        for handle in handles:
            handle.remove()
    assert [index for index, _ in called[0]] == [index for index, _ in called[1]] == [0, 2, 3]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(*called, strict=True))


def test_captures_and_saving(pair: tuple[Any, Any], tmp_path: Path) -> None:
    sharded = pair[0]
    for model in pair:
        del layers_of(model)[1]
    paths = [f"{sharded._parts.layers}.{index}" for index in range(3)]
    with sharded.capture([f"{path}.mlp" for path in paths], positions=-1) as captured, sharded.skip_layers(0):
        sharded(IDS)
    assert [len(captured[f"{path}.mlp"]) for path in paths] == [0, 1, 1]
    for model, name in zip(pair, ("ours", "theirs"), strict=True):
        model.save_pretrained(tmp_path / name)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


def test_a_static_cache(pair: tuple[Any, Any]) -> None:
    for model in pair:
        del layers_of(model)[3]
    ours, theirs = (
        model.generate(IDS, max_new_tokens=3, do_sample=False, cache_implementation="static") for model in pair
    )
    assert torch.equal(ours, theirs)

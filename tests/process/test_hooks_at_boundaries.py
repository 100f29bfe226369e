"""Where layers pass from one stage to the next, hooks do and show what they do in the uncut model: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])

SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]

Pair = tuple[Any, Any]


@pytest.fixture(params=["granite", "bloom"])
def pair(request: pytest.FixtureRequest, place: Callable[..., Any], tmp_path: Path) -> Pair:
    """A model in three stages, and the uncut one, by whose last bits products of other strides differ."""
    folder = save_tiny(request.param, torch.float32, tmp_path)
    return place(str(folder), SPANS), reference(folder)


def layers_of(model: Any) -> Any:
    return model.get_submodule("transformer.h" if hasattr(model, "transformer") else "model.layers")


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for index, each in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert torch.equal(*each), f"hidden state {index}"


def double(_module: Any, args: Any) -> Any:
    return (2 * args[0], *args[1:])


def double_in_place(_module: Any, args: Any) -> None:
    args[0].mul_(2)


@torch.no_grad()
def test_hidden_states_are_recorded_before_a_pre_hook_changes_them(pair: Pair) -> None:
    for index in range(4):
        for hook in (double, double_in_place):
            outputs = []
            for model in pair:
                with layers_of(model)[index].register_forward_pre_hook(hook):
                    outputs.append(model(IDS, output_hidden_states=True))
            assert_same(*outputs)


@torch.no_grad()
def test_what_a_pre_hook_changes_in_place_shows_where_a_hook_has_only_looked(pair: Pair) -> None:
    for model in pair:
        model(IDS, output_hidden_states=True)  # hooks that are registered later run once outputs are recorded
    for index in range(3):
        outputs = []
        for model in pair:
            layers = layers_of(model)
            with (
                layers[index].register_forward_hook(lambda *_: None),
                layers[index + 1].register_forward_pre_hook(double_in_place),
            ):
                outputs.append(model(IDS, output_hidden_states=True))
        assert_same(*outputs)


def turned(states: Tensor) -> Tensor:
    """Copy states so that those of different tokens lie side by side in memory."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)


@torch.no_grad()
def test_tensors_keep_their_strides_between_stages(pair: Pair) -> None:
    def turn(_module: Any, _args: Any, output: Any) -> Any:
        return turned(output) if isinstance(output, Tensor) else (turned(output[0]), *output[1:])

    for index in range(4):
        outputs = []
        for model in pair:
            with layers_of(model)[index].register_forward_hook(turn):
                outputs.append(model(IDS, output_hidden_states=True))
        assert_same(*outputs)
    embeddings = turned(pair[1].get_input_embeddings()(IDS))
    assert_same(*(model(inputs_embeds=embeddings, output_hidden_states=True) for model in pair))


@torch.no_grad()
def test_the_first_layer_that_is_left_has_hooks(pair: Pair) -> None:
    """They are given what its stage has received, though no layer is there to pass it on."""
    for model in pair:
        del layers_of(model)[:2]
    for hook in (double, double_in_place):
        outputs = []
        for model in pair:
            with layers_of(model)[0].register_forward_pre_hook(hook):
                outputs.append(model(IDS, output_hidden_states=True))
        assert_same(*outputs)

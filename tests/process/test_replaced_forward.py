"""A function in place of a submodule's ``forward`` runs in this process, around the stage's own forward or instead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lingualinked as ll

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17]])


@contextmanager
def replaced(module: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a module's forward by a function that is made from it."""
    own = module.forward
    module.forward = make(own)
    try:
        yield
    finally:
        module.forward = own


def run(model: Any) -> list[Tensor]:
    return [model(IDS, use_cache=False).logits, model.generate(IDS, max_new_tokens=3, do_sample=False)]


@pytest.fixture
def compare(sharded: ll.ShardedModel, unsharded: PreTrainedModel) -> Callable[[Callable[[Any], list[Tensor]]], None]:
    def compare_results(script: Callable[[Any], list[Tensor]]) -> None:
        with torch.no_grad():
            ours, theirs = script(sharded), script(unsharded)
            assert [torch.equal(*pair) for pair in zip(ours, theirs, strict=True)] == [True] * len(theirs)
            plain = run(unsharded)
            assert not torch.equal(theirs[0], plain[0])  # it has had an effect
            assert all(map(torch.equal, run(sharded), plain))  # and is over

    return compare_results


Compare = Callable[[Callable[[Any], list[Tensor]]], None]


def test_inputs_and_outputs_are_changed_around_the_forward(compare: Compare) -> None:
    def script(model: Any) -> list[Tensor]:
        with replaced(model.model.layers[1].mlp, lambda own: lambda hidden: own(hidden * 2) * 0.5):
            return run(model)

    compare(script)


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.2", "model.layers.1.mlp", "lm_head"])
def test_a_module_is_skipped(compare: Compare, path: str) -> None:
    def script(model: Any) -> list[Tensor]:
        width = 128 if path == "lm_head" else 32

        def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.nn.functional.pad(hidden_states * 0.9, (0, width - hidden_states.shape[-1]))

        with replaced(model.get_submodule(path), lambda own: skip):
            return run(model)

    compare(script)


def test_attention_is_skipped_in_one_step_and_runs_in_the_next(compare: Compare) -> None:
    def script(model: Any) -> list[Tensor]:
        cache = model(IDS, use_cache=True).past_key_values
        token = torch.tensor([[7]])
        with replaced(
            model.model.layers[1].self_attn, lambda own: lambda hidden_states, **_: (hidden_states * 0, None)
        ):
            skipped = model(token, past_key_values=cache).logits
        return [skipped, model(token, past_key_values=cache).logits]

    compare(script)


def test_what_every_stage_runs_is_called_once(compare: Compare) -> None:
    def script(model: Any) -> list[Tensor]:
        seen: list[Tensor] = []

        def turn(own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden: Tensor, position_ids: Tensor) -> Any:
                seen.append(position_ids.clone())
                cosine, sine = own(hidden, position_ids=position_ids)
                return cosine * 0.9, sine

            return forward

        with replaced(model.model.rotary_emb, turn):
            return [*run(model), *seen]

    compare(script)


def test_every_module_at_once_with_hooks_too(compare: Compare) -> None:
    def script(model: Any) -> list[Tensor]:
        seen: list[Any] = []
        modules = [module for path, module in model.named_modules() if path]

        def watched(module: Any) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = type(module).forward(module, *args, **kwargs)
                seen.append(output)
                return output

            return forward

        for module in modules:
            vars(module)["forward"] = watched(module)
        attention = model.model.layers[2].self_attn
        handles = [
            attention.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
            ),
            attention.register_forward_hook(lambda _, args, output: (output[0] * 2, *output[1:])),
        ]
        try:
            results = run(model)
        finally:
            for module in modules:
                del module.forward
            for handle in handles:
                handle.remove()
        return [*results, *(each.clone() for each in seen if isinstance(each, Tensor))]

    compare(script)


def test_the_layers_of_several_stages_are_not_skipped_at_once(sharded: ll.ShardedModel) -> None:
    with (
        replaced(sharded.model, lambda own: lambda **_: None),
        pytest.raises(ll.UnsupportedOperationError, match=r"forward of model of a sharded model .* call it"),
        torch.no_grad(),
    ):
        sharded(IDS)
    assert sharded(IDS).logits.shape == (1, 6, 128)


class Doubled(nn.Module):
    """Wraps a layer: doubles what its MLP adds, or what it returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * 2


def test_wrappers_take_the_places_of_modules_and_can_be_hooked(compare: Compare) -> None:
    def script(model: Any) -> list[Tensor]:
        parents = [*model.model.layers[1:3], model]
        names, seen = ["mlp", "mlp", "lm_head"], []
        own = [getattr(parent, name) for parent, name in zip(parents, names, strict=True)]
        for parent, name, module in zip(parents, names, own, strict=True):
            setattr(parent, name, Doubled(module))
        model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output))
        own[0].register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            return [*run(model), *(each.clone() for each in seen)]
        finally:
            own[0]._forward_hooks.clear()
            for parent, name, module in zip(parents, names, own, strict=True):
                setattr(parent, name, module)

    compare(script)

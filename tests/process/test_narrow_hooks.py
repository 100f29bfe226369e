"""`lingualinked.hook` does the same on a sharded model and on the unsharded one, and only what it wants travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from both_models import BothModels
from lingualinked.sharded.hooks.hook_calls import HookCall

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
ROWS, TOKENS, HIDDEN = *IDS.shape, 32


@pytest.fixture
def both(sharded: Any, unsharded: Any) -> BothModels:
    return BothModels(sharded, unsharded)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all tensors that hooks of a sharded model are sent."""
    shapes: list[tuple[int, ...]] = []
    receive = HookCall.receive

    def note(self: HookCall, message: Any, tensors: tuple[Tensor, ...], *rest: Any) -> None:
        shapes.extend(tuple(tensor.shape) for tensor in tensors)
        receive(self, message, tensors, *rest)

    monkeypatch.setattr(HookCall, "receive", note)
    return shapes


POSITIONS: list[tuple[Any, tuple[int, ...]]] = [
    (None, (ROWS, TOKENS, HIDDEN)),
    (-1, (ROWS, HIDDEN)),
    (2, (ROWS, HIDDEN)),
    (slice(1, -2), (ROWS, TOKENS - 3, HIDDEN)),
    (slice(None, None, 3), (ROWS, 3, HIDDEN)),
    ([5, -7, 3], (ROWS, 3, HIDDEN)),
    (torch.tensor([0]), (ROWS, 1, HIDDEN)),
    ([], (ROWS, 0, HIDDEN)),
]


@pytest.mark.parametrize(("positions", "shape"), POSITIONS, ids=str)
@torch.no_grad()
def test_an_output_is_read_and_replaced_at_positions(
    both: BothModels, received: list[Any], positions: Any, shape: tuple[int, ...]
) -> None:
    def run(model: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        outputs = [model(IDS, attention_mask=MASK).logits]

        def scale(value: Tensor) -> Tensor:
            seen.append(value.clone())
            return value * 3

        def change(value: Tensor) -> None:
            value += 1

        for module in (model.model.layers[1].mlp, model.model.layers[2], model.model.layers[3].self_attn):
            for function in (scale, change, seen.append):
                with ll.hook(module, function, positions=positions):
                    outputs.append(model(IDS, attention_mask=MASK).logits)
        return outputs + seen

    outputs = both.run(run)
    assert set(received) == {shape}
    changes = [not torch.equal(outputs[0], each) for each in outputs[1:10]]
    assert changes == [bool(0 not in shape), bool(0 not in shape), False] * 3


@pytest.mark.parametrize("positions", [None, -1, [2, 4]], ids=str)
@torch.no_grad()
def test_it_does_what_an_ordinary_hook_does(unsharded: Any, positions: Any) -> None:
    index = slice(None) if positions is None else positions
    module = unsharded.model.layers[1].mlp

    def ordinary(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output[:, index] = output[:, index] * 3
        return output

    with module.register_forward_hook(ordinary):
        expected = unsharded(IDS).logits
    with ll.hook(module, lambda value: value * 3, positions=positions):
        assert torch.equal(unsharded(IDS).logits, expected)


@torch.no_grad()
def test_inputs_and_both(both: BothModels, received: list[Any]) -> None:
    def run(model: Any) -> list[Tensor]:
        layers, seen = model.model.layers, []
        outputs = []
        for module in (layers[1], layers[2].self_attn, layers[0].mlp.down_proj):
            for positions in (None, -2, slice(3)):
                with ll.hook(module, lambda value: value.flip(0), wants="input", positions=positions):
                    outputs.append(model(IDS, attention_mask=MASK).logits)

                def mix(given: Tensor, value: Tensor) -> Tensor:
                    seen.extend([given.clone(), value.clone()])
                    return value + given.mean()

                with ll.hook(module, mix, wants="both", positions=positions):
                    outputs.append(model(IDS, attention_mask=MASK).logits)
        return outputs + seen

    both.run(run)
    assert (ROWS, TOKENS, HIDDEN) in received
    assert (ROWS, 3, HIDDEN) in received


@torch.no_grad()
def test_several_hooks_of_a_module_run_in_their_order(both: BothModels, received: list[Any]) -> None:
    def run(model: Any, *, with_ordinary: bool = False, other: Any = -1) -> list[Any]:
        mlp, called, handles = model.model.layers[2].mlp, [], []

        def add(name: str, value: Tensor) -> Tensor:
            called.append(f"{name} {value.shape}")
            return value * 2 + 1

        def removes_itself(value: Tensor) -> None:
            called.append("once")
            handles[0].remove()
            value.neg_()

        handles.append(ll.hook(mlp, removes_itself, positions=-1))
        handles.append(ll.hook(mlp, lambda value: add("first", value), positions=-1))
        if with_ordinary:
            handles.append(mlp.register_forward_hook(lambda _m, _a, output: add("ordinary", output)))
        handles.append(ll.hook(mlp, lambda value: add("second", value), positions=other))
        handles.append(ll.hook(mlp, lambda given, value: value * given, wants="both", positions=other))
        handles.append(ll.hook(mlp, lambda value: add("before", value), wants="input", positions=slice(2)))
        logits = [model(IDS).logits, model(IDS).logits]
        for handle in handles:
            handle.remove()
        return [*logits, called, model(IDS).logits]

    both.run(run)
    assert set(received) == {(ROWS, HIDDEN), (ROWS, 2, HIDDEN)}
    both.run(run, with_ordinary=True)
    both.run(run, other=3)


def test_during_generate(both: BothModels, received: list[Any]) -> None:
    def run(model: Any) -> list[Any]:
        shapes: list[Any] = []

        def steer(value: Tensor) -> Tensor:
            shapes.append(value.shape)
            return value + torch.linspace(-9, 9, HIDDEN)

        with ll.hook(model.model.layers[1], steer, positions=-1):
            return [model.generate(IDS, attention_mask=MASK, max_new_tokens=5, num_beams=2), shapes]

    both.run(run)
    assert len(set(received)) == 1


@torch.no_grad()
def test_what_runs_all_layers_or_in_every_stage(both: BothModels) -> None:
    def run(model: Any) -> list[Tensor]:
        outputs = []
        for module, wants in ((model.model, "output"), (model.model.rotary_emb, "output"), (model.lm_head, "both")):
            with ll.hook(module, lambda *given: given[-1] * 1.5, wants=wants, positions=slice(4, None)):
                outputs.append(model(IDS, attention_mask=MASK).logits)
        with ll.hook(model.model, lambda ids: ids.flip(1), wants="input"):
            return [*outputs, model(IDS).logits]

    both.run(run)


@pytest.mark.parametrize(
    ("arguments", "function", "error", "words"),
    [
        ({"positions": 8}, lambda value: None, ll.ArgumentError, "position 8 of 8 tokens"),
        ({"positions": [1, -7]}, lambda value: None, ll.ArgumentError, "name one twice"),
        ({}, lambda value: "text", ll.ArgumentError, "returned a str"),
        ({"positions": -1}, lambda value: torch.ones(3), RuntimeError, "expand"),
        ({"wants": "both"}, lambda given, value: given.zero_(), ll.ArgumentError, "changed its input"),
    ],
)
@torch.no_grad()
def test_what_a_call_refuses(
    both: BothModels, arguments: dict[str, Any], function: Callable[..., Any], error: type[Exception], words: str
) -> None:
    def run(model: Any) -> Tensor:
        with ll.hook(model.model.layers[1].mlp, function, **arguments), pytest.raises(error, match=words):
            model(IDS)
        logits: Tensor = model(IDS).logits
        return logits

    both.run(run)


@torch.no_grad()
def test_a_tensor_without_tokens_and_a_module_without_tensors(both: BothModels) -> None:
    def run(model: Any) -> None:
        for module, wants, positions, words in (
            (model.model.embed_tokens, "input", -1, "positions select tokens"),
            (model.model.layers[1], "output", "x", "pass an int"),
        ):
            with (
                pytest.raises(ll.ArgumentError, match=words),
                ll.hook(module, lambda value: None, wants=wants, positions=positions),
            ):
                model(IDS)

    both.run(run)

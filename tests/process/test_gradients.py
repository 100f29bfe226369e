"""Gradients flow through all stages as through the uncut model: bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]

Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A model in three stages, and the uncut one, whose weights do not learn either."""
    folder = save_tiny(request.param, torch.float32, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, reference(folder).requires_grad_(False)


def compare(pair: Pair, experiment: Callable[[Any], list[Tensor]]) -> None:
    """Compare what an experiment returns of both models."""
    ours, theirs = map(experiment, pair)
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(our, their), (index, our, their)


def embed(model: Any, ids: Tensor = IDS) -> Tensor:
    """Return embeddings whose gradients are asked for."""
    return model.get_input_embeddings()(ids).detach().clone().requires_grad_()


def test_a_loss_has_gradients_with_respect_to_embeddings(pair: Pair) -> None:
    def saliency(model: Any) -> list[Tensor]:
        embeddings = embed(model)
        output = model(inputs_embeds=embeddings, attention_mask=MASK, labels=IDS, use_cache=False)
        output.loss.backward()
        assert embeddings.grad is not None
        return [output.loss.detach(), output.logits.detach(), embeddings.grad]

    compare(pair, saliency)


def test_single_logits_have_gradients(pair: Pair) -> None:
    """With KV, which transformers keeps by default, and without a mask."""

    def attribute(model: Any) -> list[Tensor]:
        embeddings = embed(model)
        logits = model(inputs_embeds=embeddings, logits_to_keep=1).logits
        gradients = [
            torch.autograd.grad(logits[row, -1, token], embeddings, retain_graph=True)[0]
            for row, token in ((0, 3), (1, 5))
        ]
        return [*gradients, torch.autograd.grad(logits.sum(), embeddings)[0]]

    compare(pair, attribute)


def layers_of(model: Any) -> Any:
    return model.get_submodule("transformer.h" if hasattr(model, "transformer") else "model.layers")


def mlp_of(layer: Any) -> Any:
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def attention_of(layer: Any) -> Any:
    return next(module for name, module in layer.named_children() if name in ("self_attn", "attn", "self_attention"))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, value: Tensor) -> Any:
    return value if isinstance(output, Tensor) else (value, *output[1:])


def test_a_vector_that_a_hook_adds_learns(pair: Pair) -> None:
    """Ids only: nothing before the hook has a gradient."""

    def steer(model: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for module in (layers_of(model)[1], mlp_of(layers_of(model)[2]), layers_of(model)[3]):
            vector = torch.linspace(-1, 1, 32).requires_grad_()

            def add(_m: Any, _a: Any, output: Any, vector: Tensor = vector) -> Any:
                return with_first(output, first(output) + vector)

            with module.register_forward_hook(add):
                output = model(IDS, attention_mask=MASK, labels=IDS)
            output.loss.backward()
            assert vector.grad is not None
            found += [output.logits.detach(), vector.grad]
        return found

    compare(pair, steer)


def test_activations_that_hooks_keep_have_gradients(pair: Pair) -> None:
    """Attribution patching: one forward and one backward pass, with hooks in all stages that return nothing."""

    def attribute(model: Any) -> list[Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_m: Any, _a: Any, output: Any) -> None:
                kept[name] = first(output)
                kept[name].retain_grad()

            return hook

        handles = []
        for index, layer in enumerate(layers_of(model)):
            for kind, module in (("layer", layer), ("mlp", mlp_of(layer)), ("attention", attention_of(layer))):
                handles.append(module.register_forward_hook(keep(f"{kind} {index}")))
        embeddings = embed(model)
        logits = model(inputs_embeds=embeddings, attention_mask=MASK).logits
        for handle in handles:
            handle.remove()
        (logits[:, -1, 3] - logits[:, -1, 5]).sum().backward()
        found = [embeddings.grad, *kept.values(), *(each.grad for each in kept.values())]
        assert len(found) == 1 + 2 * 3 * 4
        return [each.detach() for each in found if each is not None]

    compare(pair, attribute)

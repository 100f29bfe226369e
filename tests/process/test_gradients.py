"""Gradients flow through all stages as through the uncut model: bit for bit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.cluster.workers.inspection import inspect_workers

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


def with_hooks(model: Any, hooks: list[tuple[Any, Callable[..., Any]]], **arguments: Any) -> tuple[Tensor, Any]:
    """Call a model with embeddings and hooks; a hook that takes keyword arguments comes before its module."""
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if "kwargs" in hook.__code__.co_varnames
        else module.register_forward_hook(hook)
        for module, hook in hooks
    ]
    embeddings = embed(model)
    try:
        return embeddings, model(inputs_embeds=embeddings, attention_mask=MASK, **arguments)
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_that_change_their_inputs_and_outputs(pair: Pair) -> None:
    """Returned, in place, by another tensor, and without a gradient: around what by-passes the module."""

    def change(model: Any) -> list[Tensor]:
        layers = layers_of(model)
        vector, leaf = torch.ones(32).requires_grad_(), torch.ones(2, 8, 32).requires_grad_()

        def scale(_module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] * vector, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * vector}

        def add_in_place(_module: Any, _args: Any, output: Any) -> None:
            first(output)[:, -1] += vector

        found = []
        for hooks in (
            [(layers[1], scale), (attention_of(layers[2]), scale), (layers[3], scale)],
            [(layers[0], add_in_place), (layers[1], add_in_place)],
            [(mlp_of(layers[1]), lambda _m, _a, output: with_first(output, torch.zeros_like(first(output))))],
            [(mlp_of(layers[2]), lambda _m, _a, output: with_first(output, first(output).detach()))],
            [(attention_of(layers[1]), lambda _m, _a, output: with_first(output, leaf + vector))],
        ):
            embeddings, output = with_hooks(model, hooks)
            wanted = [embeddings, vector, leaf]
            gradients = torch.autograd.grad(output.logits[:, -1, 4].sum(), wanted, allow_unused=True)
            found += [output.logits.detach(), *(each for each in gradients if each is not None)]
        return found

    compare(pair, change)


def test_what_hooks_keep_counts_in_a_loss(pair: Pair) -> None:
    """Of outputs and inputs of layers, beside the logits, and in the hook of another layer."""

    def observe(model: Any) -> list[Tensor]:
        layers = layers_of(model)
        kept: list[Tensor] = []

        def keep(_module: Any, args: Any, output: Any) -> None:
            kept.extend([first(output), args[0]])
            for each in kept:
                each.retain_grad()

        def add_first(_module: Any, _args: Any, output: Any) -> Any:
            return with_first(output, first(output) + 0.5 * kept[0])

        embeddings, output = with_hooks(model, [*((layer, keep) for layer in layers[:3]), (layers[3], add_first)])
        own = sum(each.square().mean() for each in kept)
        ((embeddings**2).mean() + own + output.logits[:, -1, 4].sum()).backward()
        return [each.grad for each in (embeddings, *kept) if each.grad is not None]

    compare(pair, observe)


def test_gradients_of_what_modules_inside_layers_are_given(pair: Pair) -> None:
    """What several modules are given is one tensor; and passes that lead to some tensors only, of one graph."""

    def observe(model: Any) -> list[Tensor]:
        layer = layers_of(model)[2]
        kept: list[Tensor] = []

        def keep(_module: Any, args: Any, output: Any) -> None:
            kept.extend([args[0], first(output)])

        inner = [each for each in layer.modules() if type(each).__name__ in ("Linear", "Conv1D")]
        embeddings, output = with_hooks(model, [(module, keep) for module in (layer, *inner)])
        loss = output.logits[:, -1, 4].sum()
        found = [torch.autograd.grad(loss, each, retain_graph=True)[0] for each in (kept[-1], kept[0], kept[3])]
        found += torch.autograd.grad(kept[-1].sum(), [kept[0], embeddings], retain_graph=True)
        found += torch.autograd.grad(loss, [embeddings, *kept])
        return [*kept, *found]

    compare(pair, observe)


@pytest.fixture(scope="module")
def llama(shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = save_tiny("llama", torch.float32, tmp_path_factory.mktemp("llama"))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, reference(folder).requires_grad_(False)


def test_a_soft_prompt_learns(llama: Pair) -> None:
    def learn(model: Any) -> list[Tensor]:
        prompt = torch.linspace(-1, 1, 96).view(1, 3, 32).requires_grad_()
        optimizer = torch.optim.SGD([prompt], lr=0.1)
        labels = torch.cat([torch.full((2, 3), -100), IDS], dim=1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            embeddings = torch.cat([prompt.expand(2, -1, -1), embed(model).detach()], dim=1)
            loss = model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, prompt.detach()]

    compare(llama, learn)


def test_gradients_behind_kv_without_gradients(llama: Pair) -> None:
    def go_on(model: Any) -> list[Tensor]:
        with torch.no_grad():
            past = model(IDS[:, :4]).past_key_values
        embeddings = embed(model, IDS[:, 4:])
        output = model(inputs_embeds=embeddings, past_key_values=past)
        output.logits[:, -1].sum().backward()
        with torch.no_grad():
            later = model(IDS[:, :1], past_key_values=output.past_key_values).logits
        assert embeddings.grad is not None
        return [embeddings.grad, later]

    compare(llama, go_on)


def test_what_can_have_no_gradients_is_refused(llama: Pair) -> None:
    model = llama[0]
    embeddings = embed(model)
    output = model(inputs_embeds=embeddings)
    with pytest.raises(ll.UnsupportedOperationError, match="KV of earlier steps"):
        model(IDS[:, :1], past_key_values=output.past_key_values)
    with pytest.raises(ll.UnsupportedOperationError, match="create_graph=True"):
        torch.autograd.grad(output.logits.sum(), embeddings, create_graph=True)
    output = model(inputs_embeds=embeddings)
    output.logits.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        output.logits.sum().backward()
    with pytest.raises(ll.UnsupportedOperationError, match="output_hidden_states in a step with gradients"):
        model(inputs_embeds=embeddings, output_hidden_states=True)
    vector = torch.ones(32).requires_grad_()
    with (
        model.model.layers[1].register_forward_hook(lambda _m, _a, output: output + vector),
        pytest.raises(ll.UnsupportedOperationError, match="output_hidden_states in a step with gradients"),
    ):
        model(IDS, output_hidden_states=True)
    assert not model(IDS).logits.requires_grad


def test_passes_in_four_threads(llama: Pair) -> None:
    """Each on graphs of its own, with a hook that each of them passes."""
    sharded, unsharded = llama

    def attribute(model: Any, row: int) -> Tensor:
        embeddings = embed(unsharded, IDS[row % 2 : row % 2 + 1])
        logits = model(inputs_embeds=embeddings).logits
        return torch.autograd.grad(logits[:, -1, row].sum(), embeddings)[0]

    def double(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output * 2

    with sharded.model.layers[1].register_forward_hook(double), ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(lambda row: attribute(sharded, row), range(8)))
    with unsharded.model.layers[1].register_forward_hook(double):
        theirs = [attribute(unsharded, row) for row in range(8)]
    assert all(map(torch.equal, ours, theirs))


def test_a_backward_pass_ends_with_a_worker_and_with_a_move(tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    with (
        ll.Cluster([ll.Device(name=name, threads=1) for name in "abc"]) as cluster,
        ll.ShardedModel.from_pretrained(
            str(folder), cluster=cluster, plan=ll.Plan.from_spans(SPANS), progress=False
        ) as model,
    ):
        embeddings = torch.randn(1, 4, 32, requires_grad=True)
        # 1) an exception of the user's ends it, and the graph serves again
        output = model(inputs_embeds=embeddings, use_cache=False)
        kept: list[Tensor] = []
        with model.model.layers[1].register_forward_hook(lambda _m, _a, output: kept.append(output)):
            hooked = model(inputs_embeds=embeddings, use_cache=False)

        def fail(_gradient: Tensor) -> None:
            raise OwnError

        handle = kept[0].register_hook(fail)
        with pytest.raises(OwnError):
            hooked.logits.sum().backward(retain_graph=True)
        handle.remove()
        hooked.logits.sum().backward()
        # 2) layers move between the two passes
        model.rebalance(ll.Plan.from_spans([("a", 0, 2), ("b", 2, 3), ("c", 3, 4)]))
        with pytest.raises(ll.ArgumentError, match="layers have moved since the forward pass"):
            output.logits.sum().backward()
        # 3) Ctrl-C while a stage does not answer; the graph serves again
        output = model(inputs_embeds=embeddings, use_cache=False)
        os.kill(cluster.pids["b"], signal.SIGSTOP)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            output.logits.sum().backward(retain_graph=True)
        timer.join()
        os.kill(cluster.pids["b"], signal.SIGCONT)
        embeddings.grad = None
        output.logits.sum().backward(retain_graph=True)
        assert embeddings.grad is not None
        # 4) a worker ends
        os.kill(cluster.pids["b"], signal.SIGKILL)
        with pytest.raises(ll.WorkerDiedError, match="'b'"):
            output.logits.sum().backward()


class OwnError(Exception):
    pass


def test_graphs_are_freed_with_what_refers_to_them(llama: Pair) -> None:
    """Dropped without a backward pass, after one, and after one that leads to a hook only, which leaves its stage waiting."""
    model = llama[0]

    def held() -> list[int]:
        reports = inspect_workers(model._pipeline._engine, "abc", 30)
        return [each.device.held_bytes for each in reports]

    before = held()
    embeddings = embed(llama[1])
    kept: list[Tensor] = []
    with model.model.layers[1].register_forward_hook(lambda _m, _a, output: kept.append(output)):
        outputs = [model(inputs_embeds=embeddings, use_cache=False) for _ in range(3)]
    while_held = held()
    assert all(now > then for now, then in zip(while_held, before, strict=True))
    outputs[1].logits.sum().backward()
    torch.autograd.grad(outputs[2].logits.sum(), kept[2])
    outputs.clear()
    kept.clear()
    assert held() == before

"""Weights that are edited in the workers: the model computes, and reads, what the same statements make of the unsharded one."""

from __future__ import annotations

import concurrent.futures
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17]])
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
FAMILIES = {"llama-wide": torch.bfloat16, "gemma2": torch.float32}  # packed in the workers; tied
ONES = 0.25


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """A model in three stages, and the unsharded one."""
    folder = save_tiny(request.param, FAMILIES[request.param], tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, reference(folder)


@pytest.fixture(autouse=True)
def undone(pair: tuple[Any, Any]) -> Iterator[None]:
    """Undo all edits of both."""
    sharded, unsharded = pair
    tensors = [*unsharded.parameters(), *unsharded.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for edit in sharded.edits[::-1]:
        edit.undo()
    for tensor, value in zip(tensors, before, strict=True):
        tensor.data.copy_(value)
    assert_same(pair)
    assert not sharded.edits


@torch.no_grad()
def assert_same(pair: tuple[Any, Any]) -> None:
    """Compare a prompt, and a token after it."""
    ours, theirs = (model(IDS) for model in pair)
    assert torch.equal(ours.logits, theirs.logits)
    ours, theirs = (
        model(IDS[:, :1], past_key_values=each.past_key_values)
        for model, each in zip(pair, (ours, theirs), strict=True)
    )
    assert torch.equal(ours.logits, theirs.logits)


def projection(model: Any) -> Any:
    return model.model.layers[2].mlp.down_proj.weight


STATEMENTS: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda model: projection(model).copy_(torch.full_like(projection(model), ONES)),
    "mul_ of data": lambda model: projection(model).data.mul_(2),
    "a row": lambda model: projection(model).__setitem__(3, ONES),
    "a column of a view": lambda model: projection(model).T[1:3].zero_(),
    "an element": lambda model: projection(model)[1].data.__setitem__(2, -ONES),
    "rank one": lambda model: projection(model).add_(torch.outer(*factors(model))),
    "normal_": lambda model: (torch.manual_seed(0), nn.init.normal_(projection(model), std=0.1)),
    "normal_ of rows": lambda model: (torch.manual_seed(0), nn.init.normal_(projection(model)[:4])),
    "data =": lambda model: setattr(projection(model), "data", torch.flip(projection(model).data, [0])),
    "out=": lambda model: torch.add(projection(model), 0.5, out=projection(model).data),
    "foreach": lambda model: torch._foreach_mul_(list(model.model.layers[1].parameters()), 0.5),
    "embeddings": lambda model: model.model.embed_tokens.weight[17].add_(0.5),
    "head": lambda model: model.lm_head.weight.mul_(0.5),
    "norm": lambda model: model.model.norm.weight.fill_(0.25),
    "rotary": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "every parameter": lambda model: [each.mul_(0.9) for each in model.parameters()],
}


def factors(model: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    weight = projection(model)
    return torch.randn(weight.shape[0]).to(weight.dtype), torch.randn(weight.shape[1]).to(weight.dtype)


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
@torch.no_grad()
def test_statements(pair: tuple[Any, Any], statement: Callable[[Any], Any]) -> None:
    before = pair[0](IDS).logits
    for model in pair:
        statement(model)
    assert not torch.equal(pair[0](IDS).logits, before)
    assert_same(pair)
    ours, theirs = (model.state_dict() for model in pair)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert pair[0].edits


def keys_and_values(model: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    weight = projection(model)
    return torch.randn(weight.shape[0], 2).to(weight.dtype), torch.randn(weight.shape[1], 2).to(weight.dtype)


@torch.no_grad()
def test_factors_within_generate_and_their_undoing(pair: tuple[Any, Any]) -> None:
    sharded, unsharded = pair
    first, second = factors(sharded), keys_and_values(sharded)
    original = projection(sharded).clone()
    with ll.edit(projection(sharded), add=first) as one:
        projection(unsharded).add_(torch.outer(*first))
        assert_same_tokens(pair)
        two = ll.edit(projection(sharded), add=second)
        projection(unsharded).add_(second[0] @ second[1].T)
        assert_same_tokens(pair)
        assert torch.equal(projection(sharded), projection(unsharded))
        assert [each.name for each in sharded.edits] == ["model.layers.2.mlp.down_proj.weight"] * 2
        assert one.is_in_force
    assert not one.is_in_force
    assert torch.equal(projection(sharded), original + second[0] @ second[1].T)
    two.undo()
    two.undo()
    assert torch.equal(projection(sharded), original)
    with pytest.raises(ZeroDivisionError), ll.edit(projection(sharded), set=torch.zeros_like(original)):
        raise ZeroDivisionError
    assert torch.equal(projection(sharded), original)
    projection(unsharded).copy_(original)


def assert_same_tokens(pair: tuple[Any, Any]) -> None:
    ours, theirs = (model.generate(IDS, max_new_tokens=4, do_sample=False) for model in pair)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_what_was_read_before_shows_the_edit(pair: tuple[Any, Any]) -> None:
    rows = [projection(model)[1:3] for model in pair]
    arrays = [
        (model.model.norm.weight if hasattr(model.model.norm, "weight") else projection(model)).data for model in pair
    ]
    arrays = [array.float()[:0] if array.dtype is torch.bfloat16 else array.numpy() for array in arrays]
    for model in pair:
        projection(model).mul_(2)
        model.model.norm.weight.fill_(0.5)
    assert torch.equal(*rows)
    assert (arrays[0] == arrays[1]).all()
    edit = ll.edit(projection(pair[0]), add=torch.ones(()))
    projection(pair[1]).add_(1.0)
    assert torch.equal(*rows)
    edit.undo()
    projection(pair[1]).copy_(projection(pair[0]))
    assert torch.equal(*rows)


@torch.no_grad()
def test_what_is_saved_is_edited(pair: tuple[Any, Any], tmp_path: Path) -> None:
    for model, name in zip(pair, ("ours", "theirs"), strict=True):
        projection(model).neg_()
        model.lm_head.weight[:, 3] = 0.5
        model.save_pretrained(tmp_path / name)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


@torch.no_grad()
def test_sessions_are_told_that_their_kv_is_older(pair: tuple[Any, Any]) -> None:
    past = [model(IDS).past_key_values for model in pair]
    assert not past[0].made_before_edit
    for model in pair:
        projection(model).mul_(-1)
    with pytest.warns(ll.StaleKVWarning, match="made before the model was changed") as told:
        logits = [model(IDS[:, :1], past_key_values=each).logits for model, each in zip(pair, past, strict=True)]
    assert torch.equal(*logits)
    assert told[0].filename == __file__
    logits = [model(IDS[:, :1], past_key_values=each).logits for model, each in zip(pair, past, strict=True)]
    assert torch.equal(*logits)
    assert past[0].made_before_edit
    assert not pair[0](IDS).past_key_values.made_before_edit


MOVES = [
    [("a", 0, 1), ("b", 1, 2), ("c", 2, 4)],
    [("c", 0, 2), ("a", 2, 3), ("b", 3, 4)],
    [("b", 0, 4)],
    SPANS,
]


@torch.no_grad()
def test_edits_move_with_the_layers(pair: tuple[Any, Any]) -> None:
    sharded, unsharded = pair
    u, v = factors(sharded)
    edit = ll.edit(projection(sharded), add=(u, v))
    original = projection(unsharded).clone()
    projection(unsharded).add_(torch.outer(u, v))
    for model in pair:
        model.lm_head.weight[3:7].mul_(2)
        model.model.rotary_emb.inv_freq.mul_(0.5)
    for number, spans in enumerate(MOVES):
        past = [model(IDS).past_key_values for model in pair]
        sharded.rebalance(ll.Plan.from_spans(spans))
        logits = [model(IDS[:, :1], past_key_values=each).logits for model, each in zip(pair, past, strict=True)]
        assert torch.equal(*logits)
        if number == 0:
            edit.undo()
            projection(unsharded).copy_(original)
        if number == 1:
            for model in pair:
                model.model.embed_tokens.weight[17].add_(0.5)
        assert_same(pair)
    assert torch.equal(projection(sharded), original)


def test_each_step_runs_before_or_after_an_edit_and_none_is_lost(pair: tuple[Any, Any]) -> None:
    sharded, unsharded = pair
    known = []
    with torch.no_grad():
        for number in range(7):
            if number:
                unsharded.lm_head.weight.add_(0.25)
            known.append(unsharded(IDS).logits)

    def add(_: int) -> None:
        with torch.no_grad():
            sharded.lm_head.weight.add_(0.25)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        steps = [pool.submit(sharded, IDS) for _ in range(4)]
        edits = [pool.submit(add, number) for number in range(6)]
        steps += [pool.submit(sharded, IDS) for _ in range(8)]
    for step in steps:
        assert any(torch.equal(step.result().logits, logits) for logits in known)
    assert [edit.result() for edit in edits] == [None] * 6
    assert torch.equal(sharded.lm_head.weight, unsharded.lm_head.weight)
    assert_same(pair)


@torch.no_grad()
def test_an_edit_inside_a_hook_counts_from_there_on(pair: tuple[Any, Any]) -> None:
    logits = []
    for model in pair:

        def hook(*_: Any, model: Any = model) -> None:
            model.model.norm.weight.mul_(0.5)
            model.model.layers[0].mlp.down_proj.weight.zero_()

        handle = model.model.layers[1].register_forward_hook(hook)
        logits.append(model(IDS).logits)
        handle.remove()
    assert torch.equal(*logits)
    assert_same(pair)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lent_weights_are_edited_where_they_are_borrowed(
    family: str, shared_cluster: ll.Cluster, tmp_path: Path
) -> None:
    folder = save_tiny(family, FAMILIES[family], tmp_path / "checkpoint")
    unsharded = reference(folder)
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        shutil.rmtree(folder)
        pair = (sharded, unsharded)
        for model in pair:
            model.model.embed_tokens.weight[17].add_(0.5)
        with ll.edit(projection(sharded), add=factors(sharded)):
            original = projection(unsharded).clone()
            projection(unsharded).add_(torch.outer(*factors(unsharded)))
            for spans in ([("d", 0, 2), ("c", 2, 4)], [("c", 0, 4)]):
                sharded.rebalance(ll.Plan.from_spans(spans))
                assert_same(pair)
        projection(unsharded).copy_(original)
        assert_same(pair)


WRONG: dict[str, tuple[type[Exception], Callable[[Any], Any]]] = {
    "no tensor of a model": (ll.ArgumentError, lambda weight: ll.edit(torch.ones(3), add=torch.ones(3))),
    "neither": (ll.ArgumentError, ll.edit),
    "both": (ll.ArgumentError, lambda weight: ll.edit(weight, add=torch.ones(()), set=weight)),
    "another shape": (ll.ArgumentError, lambda weight: ll.edit(weight, set=torch.ones(3))),
    "another dtype": (ll.ArgumentError, lambda weight: ll.edit(weight, set=weight.double())),
    "factors of another shape": (ll.ArgumentError, lambda weight: ll.edit(weight, add=(torch.ones(3), torch.ones(4)))),
    "three factors": (ll.ArgumentError, lambda weight: ll.edit(weight, add=(torch.ones(3),) * 3)),
    "no data": (ll.ArgumentError, lambda weight: ll.edit(weight, set=torch.empty_like(weight, device="meta"))),
    "factors without data": (ll.ArgumentError, lambda weight: ll.edit(weight, add=(torch.ones(1, device="meta"),) * 2)),
    "sparse": (ll.ArgumentError, lambda weight: ll.edit(weight, add=torch.zeros(weight.shape).to_sparse())),
    "complex": (ll.ArgumentError, lambda weight: ll.edit(weight, add=torch.ones((), dtype=torch.complex64))),
    "data of another dtype": (ll.UnsupportedOperationError, lambda weight: setattr(weight, "data", weight.double())),
    "another shape, in place": (ll.UnsupportedOperationError, lambda weight: weight.data.t_()),
    "what torch refuses": (RuntimeError, lambda weight: weight.copy_(torch.ones(3, 3))),
    "with gradients": (RuntimeError, lambda weight: torch.enable_grad()(weight.mul_)(2)),
}


@torch.no_grad()
def test_what_does_not_fit_is_refused(pair: tuple[Any, Any]) -> None:
    for error, change in WRONG.values():
        with pytest.raises(error):
            change(projection(pair[0]))
    assert not pair[0].edits


def test_a_view_keeps_no_closed_model(pair: tuple[Any, Any], shared_cluster: ll.Cluster) -> None:
    model = ll.ShardedModel.from_pretrained(
        pair[0].config._name_or_path, cluster=shared_cluster, plan=ll.Plan.from_spans(SPANS), progress=False
    )
    row = projection(model).data[0]
    edit = ll.edit(projection(model), add=torch.ones(()))
    model.close()
    del model
    gc.collect()
    for change in (row.zero_, edit.undo):
        with pytest.raises(ll.ClosedError):
            change()

"""Weights that are edited in the workers: the model computes, and reads, what the same statements make of the unsharded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

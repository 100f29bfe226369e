"""Weights of a sharded model are read from the workers that hold them, with the bits of the unsharded one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17]])
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
FAMILIES = {
    "llama-wide": torch.bfloat16,  # packed in the workers
    "llama-tied": torch.float32,
    "llama-dynamic": torch.float32,
    "gpt2": torch.float32,
    "gemma2": torch.float32,
    "mixtral": torch.float32,
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """A model in three stages, and the unsharded one."""
    folder = save_tiny(request.param, FAMILIES[request.param], tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, reference(folder)


def test_every_parameter_and_buffer(pair: tuple[Any, Any]) -> None:
    for names in ("named_parameters", "named_buffers"):
        ours, theirs = (list(getattr(model, names)(remove_duplicate=False)) for model in pair)
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [name for (name, our), (_, their) in zip(ours, theirs, strict=True) if not torch.equal(our, their)] == []
    ours, theirs = (model.state_dict() for model in pair)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_a_logit_lens(pair: tuple[Any, Any]) -> None:
    for index in range(5):
        logits = []
        for model in pair:
            decoder, head = model.base_model, model.get_output_embeddings()
            norm = getattr(decoder, "norm", None) or decoder.ln_f
            states = model(IDS, output_hidden_states=True).hidden_states[index]
            logits.append((head(norm(states)), functional.linear(states, head.weight), states @ head.weight.T))
        for ours, theirs in zip(*logits, strict=True):
            assert torch.equal(ours, theirs)
    ours, theirs = (model.get_input_embeddings()(IDS) for model in pair)
    assert torch.equal(ours, theirs)

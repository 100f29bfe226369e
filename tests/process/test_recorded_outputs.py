"""Hidden states and attentions of a sharded model are those of the unsharded one: bit for bit, in ``forward`` and ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lingualinked as ll
from families import reference, save_tiny, tiny_config

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {"output_hidden_states": False},
    "hidden states": {"output_hidden_states": True},
    "one hidden state": {"output_hidden_states": 2},
    "some hidden states": {"output_hidden_states": [0, 3, -1, 99]},
    "attentions": {"output_attentions": True},
    "both": {"output_hidden_states": True, "output_attentions": True},
}
MIXED = {"mlp_only_layers": [0], "decoder_sparse_step": 2}  # layers with and without experts


@pytest.fixture(scope="module", params=["llama", "gpt2", "bloom", "gemma3", "mixtral"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """A model in three stages, and the unsharded one, both with eager attention."""
    folder = save_tiny(request.param, torch.float32, tmp_path_factory.mktemp(request.param))
    whole = reference(folder, attn_implementation="eager")
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
    with ll.ShardedModel.from_pretrained(
        str(folder), cluster=shared_cluster, plan=plan, attn_implementation="eager", progress=False
    ) as sharded:
        yield sharded, whole


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare outputs, with tuples in tuples, by structure and bits."""
    assert type(ours) is type(theirs), (type(ours), type(theirs))
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            if name != "past_key_values":
                assert_equal(ours[name], theirs[name])
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
    else:
        assert ours == theirs


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@torch.no_grad()
def test_forward(pair: tuple[Any, Any], asked: dict[str, Any]) -> None:
    sharded, whole = pair
    ours, theirs = (model(IDS, attention_mask=MASK, **asked) for model in pair)
    assert_equal(ours, theirs)
    mask = torch.cat([MASK, MASK[:, :1] * 0 + 1], dim=1)
    steps = (
        model(IDS[:, :1], attention_mask=mask, past_key_values=output.past_key_values, **asked)
        for model, output in ((sharded, ours), (whole, theirs))
    )
    assert_equal(*steps)
    assert_equal(*(model(IDS, use_cache=False, return_dict=False, **asked) for model in pair))


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate(pair: tuple[Any, Any], asked: dict[str, Any], mode: dict[str, Any]) -> None:
    said = []
    for model in pair:
        torch.manual_seed(0)
        said.append(
            model.generate(IDS, attention_mask=MASK, max_new_tokens=4, return_dict_in_generate=True, **mode, **asked)
        )
    assert_equal(*said)


@torch.no_grad()
def test_the_config_may_ask(pair: tuple[Any, Any]) -> None:
    for model in pair:
        model.config.output_hidden_states = True
    try:
        assert_equal(*(model(IDS) for model in pair))
        assert_equal(*(model(IDS, output_hidden_states=False) for model in pair))
        assert_equal(*(model(IDS, output_hidden_states=None) for model in pair))
    finally:
        for model in pair:
            model.config.output_hidden_states = False


@pytest.mark.cpu_only(reason="a sharded model computes the loss of routers in the caller, on the CPU")
@pytest.mark.parametrize(("family", "changed"), [("mixtral", {}), ("qwen2-moe", MIXED)])
@torch.no_grad()
def test_router_logits_and_their_loss(
    family: str, changed: dict[str, Any], place: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tiny_config(family)
    for name, value in changed.items():
        setattr(config, name, value)
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    whole = reference(folder)
    sharded = place(str(folder), [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
    calls: list[dict[str, Any]] = [
        {},
        {"labels": IDS},
        {"attention_mask": MASK, "labels": IDS},
        {"output_hidden_states": True},
    ]
    for call in calls:
        assert_equal(*(model(IDS, output_router_logits=True, **call) for model in (sharded, whole)))
    for model in (sharded, whole):
        model.config.output_router_logits = True
    for call in ({}, {"output_router_logits": None}, {"output_router_logits": False}):
        assert_equal(*(model(IDS, labels=IDS, **call) for model in (sharded, whole)))
    for model in (sharded, whole):  # transformers' own loss takes no mask of earlier tokens
        with pytest.raises(RuntimeError, match="must match the size"):
            model.generate(IDS, attention_mask=MASK, max_new_tokens=3)

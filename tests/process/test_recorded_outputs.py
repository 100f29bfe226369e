"""Hidden states and attentions of a sharded model are those of the unsharded one: bit for bit, in ``forward`` and ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from families import reference, save_tiny

pytestmark = pytest.mark.process

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {"output_hidden_states": False},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "both": {"output_hidden_states": True, "output_attentions": True},
}


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

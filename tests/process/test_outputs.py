"""Every family returns what its own class returns: the kind of output, its fields, the loss, and the KV cache or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache

import lingualinked as ll
from families import FAMILIES, reference, save_tiny

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54], [1, 5, 6, 7]])
CALLS: dict[str, dict[str, Any]] = {
    "as the config says": {},
    "with KV": {"use_cache": True},
    "without KV": {"use_cache": False},
    "a loss": {"labels": IDS},
    "a loss over a number of items": {"labels": IDS, "num_items_in_batch": torch.tensor(5)},
    "a tuple": {"return_dict": False, "labels": IDS},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_class(shared_cluster: ll.Cluster, tmp_path: Path, family: str) -> None:
    folder = save_tiny(family, torch.float32, tmp_path)
    plan = ll.Plan.from_spans([("a", 0, 4)])
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False) as model:
        seen = [outputs(each) for each in (model, reference(folder))]
    assert seen[0] == seen[1]


@torch.no_grad()
def outputs(model: Any) -> dict[str, Any]:
    """Describe what each call returns, to begin with and going on from a past."""
    described = {}
    for name, arguments in CALLS.items():
        described[name] = describe(model(IDS, **arguments), None)
        past = model(IDS, use_cache=True).past_key_values
        described[f"{name}, from a past"] = describe(model(IDS, past_key_values=past, **arguments), past)
        assert past.get_seq_length() == 8  # whether it is returned or not
    return described


def describe(output: Any, past: Cache | None) -> Any:
    if isinstance(output, dict):
        return type(output), {name: describe(value, past) for name, value in output.items()}
    if isinstance(output, tuple):
        return [describe(value, past) for value in output]
    if isinstance(output, Cache):
        return "the same past" if output is past else "a past"
    return output.dtype, output.tolist()

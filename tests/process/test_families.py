"""Every family gives the unsharded model's logits and tokens, bit for bit, however it is cut and in either dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality, pytest.mark.slow]

FAMILIES = (
    "bloom falcon-7b falcon-rw gemma gemma2 gemma3 gpt2 gpt-neox llama mistral mixtral opt phi3 qwen2 qwen3"
).split()
DTYPES = (torch.float32, torch.bfloat16)
CUTS = {
    "1 stage": [("a", 0, 4)],
    "2 stages": [("b", 0, 3), ("a", 3, 4)],
    "3 stages": [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)],
    "a stage per layer": [("d", 0, 1), ("c", 1, 2), ("b", 2, 3), ("a", 3, 4)],
}

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])  # longer than the sliding windows
PADDED = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11], [0, 1, 11, 45, 45, 3, 3, 3]])
BATCH = {"input_ids": PADDED, "attention_mask": (PADDED != 0).long()}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"input_ids": IDS},
    "sampling": {"input_ids": IDS, "do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "beam search": {"input_ids": IDS, "num_beams": 3},
    "padded batch": BATCH,
    "padded beam search": {**BATCH, "num_beams": 2},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what the unsharded model says."""

    path: str
    said: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[(family, dtype) for family in FAMILIES for dtype in DTYPES], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, dtype = request.param
    folder = save_tiny(family, dtype, tmp_path_factory.mktemp(family))
    return Case(str(folder), say_all(reference(folder)))


@pytest.fixture(params=CUTS)
def sharded(request: pytest.FixtureRequest, case: Case, shared_cluster: ll.Cluster) -> Iterator[Any]:
    plan = ll.Plan.from_spans(CUTS[request.param])
    with ll.ShardedModel.from_pretrained(case.path, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model


def test_logits_and_tokens_are_equal(case: Case, sharded: Any) -> None:
    said = say_all(sharded)
    assert [name for name in case.said if not torch.equal(said[name], case.said[name])] == []


@torch.no_grad()
def say_all(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Give the logits of a prompt and of 16 steps after it, and the tokens of every mode."""
    output = model(IDS)
    said = {"prefill": output.logits}
    for step in range(16):
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values)
        said[f"decode step {step}"] = output.logits
    for name, arguments in MODES.items():
        torch.manual_seed(7)
        said[name] = model.generate(**arguments, max_new_tokens=8, eos_token_id=None)
    return said

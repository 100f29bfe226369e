"""A batch may be split where a model says that its rows are independent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lingualinked as ll

pytestmark = pytest.mark.process


def save(folder: Path, **sizes: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 160, "vocab_size": 90, **sizes},
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_end_within_a_vector_are_not_independent(
    dtype: str, tmp_path: Path, shared_cluster: ll.Cluster
) -> None:
    save(
        tmp_path, hidden_size=256, intermediate_size=37
    )  # the last elements of a batch are computed by other functions
    with ll.ShardedModel.from_pretrained(tmp_path, cluster=shared_cluster, dtype=dtype, progress=False) as model:
        assert model.independent_rows == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_batch_that_is_split_has_the_same_bits(dtype: str, tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    save(tmp_path)
    with (
        ll.ShardedModel.from_pretrained(tmp_path, cluster=shared_cluster, dtype=dtype, progress=False) as model,
        torch.no_grad(),
    ):
        least = model.independent_rows
        if not least:
            pytest.skip("rows of a batch depend on each other here")
        ids = torch.arange(5 * 2 * least).view(2 * least, 5) % 90
        whole = model(ids)
        parts = [model(ids[:least]), model(ids[least:])]
        assert torch.equal(whole.logits, torch.cat([part.logits for part in parts]))
        following = whole.logits[:, -1:].argmax(-1)
        decoded = model(following, past_key_values=whole.past_key_values).logits
        halves = (following[:least], following[least:])
        steps = [model(half, past_key_values=part.past_key_values) for half, part in zip(halves, parts, strict=True)]
        assert torch.equal(decoded, torch.cat([step.logits for step in steps]))

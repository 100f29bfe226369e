"""A large prefill goes from stage to stage, and its logits to the caller, through memory, with the very same bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import lingualinked as ll

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")]


def shares_memory(pid: int) -> bool:
    """Return whether a process has memory open that it shares."""
    return any(str(each.readlink()).startswith("/memfd:lingualinked") for each in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_large_prefill_goes_through_shared_memory(
    tiny_llama: str, unsharded: PreTrainedModel, shared_memory: bool
) -> None:
    ids = torch.randint(3, 128, (4, 500))
    expected = unsharded(ids).logits
    with (
        ll.Cluster(2, shared_memory=shared_memory) as cluster,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan="even", progress=False) as model,
    ):
        caller = cluster._engine._mailbox
        for number in range(3):  # the first one offers the memory
            assert torch.equal(model(ids).logits, expected)
            assert caller.received_shared_bytes == (number * expected.nbytes if shared_memory else 0)
        assert [shares_memory(pid) for pid in cluster.pids.values()] == [shared_memory] * 2
        assert model.telemetry.stages[1].sent_bytes > 3 * expected.nbytes  # counted wherever they went

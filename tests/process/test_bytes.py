"""What crosses a socket: a decode step is one hidden state a hop, at any length; large replies come in several frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lingualinked as ll
from accelerators import device
from lingualinked.transport.wire.message_limits import MIN_FRAME_BYTES

pytestmark = [pytest.mark.process, pytest.mark.equality]

HIDDEN_BYTES = 32 * 4  # the tiny Llama's hidden size in float32


def sent_bytes(model: Any) -> list[int]:
    return [stage.sent_bytes for stage in model.telemetry.stages]


@pytest.mark.parametrize("context", [3, 400])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decode_step_is_one_hidden_state_a_hop(sharded: Any, context: int, rows: int, padded: bool) -> None:
    ids = torch.randint(3, 128, (rows, context))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0 if padded else 1

    def positions(mask: torch.Tensor) -> torch.Tensor:
        return (mask.cumsum(-1) - 1).clamp(min=0)

    past = sharded(ids, attention_mask=mask, position_ids=positions(mask)).past_key_values
    before = sent_bytes(sharded)
    mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.long)], dim=-1)
    sharded(ids[:, :1], attention_mask=mask, position_ids=positions(mask)[:, -1:], past_key_values=past)
    num_stages = len(before)
    for old, new in zip(before[:-1], sent_bytes(sharded)[:-1], strict=True):
        assert 0 < new - old <= HIDDEN_BYTES * rows + 256 + 32 * num_stages


def test_replies_larger_than_a_frame_come_in_several(tiny_llama: str, unsharded: PreTrainedModel) -> None:
    ids = torch.randint(3, 128, (4, 500))
    with (
        ll.Cluster([device(name) for name in "ab"], max_frame_bytes=MIN_FRAME_BYTES) as cluster,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan="even", progress=False) as model,
    ):
        logits = model(ids).logits
    assert logits.nbytes > 3 * MIN_FRAME_BYTES
    assert torch.equal(logits, unsharded(ids).logits)

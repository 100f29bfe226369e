"""Stages make room for the tokens that ``generate`` may hold, and for no more; a migration keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, StaticCache

import lingualinked as ll

pytestmark = pytest.mark.process

SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
TOKEN_BYTES = 4 * 2 * 2 * 8 * 4  # layers x keys and values x heads x dim x float32


def kv_bytes(model: ll.ShardedModel) -> int:
    return sum(stage.kv_bytes for stage in model.telemetry.stages)


def generate(model: Any, prompt: torch.Tensor, **arguments: Any) -> Any:
    return model.generate(
        prompt, eos_token_id=None, do_sample=False, return_dict_in_generate=True, **{"max_new_tokens": 29, **arguments}
    )


def test_as_many_bytes_are_held_as_tokens_may_come(
    place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    model, prompt = place(tiny_llama, SPANS), torch.arange(800)[None] % 120 + 3
    output, expected = generate(model, prompt), generate(unsharded, prompt)
    assert torch.equal(output.sequences, expected.sequences)
    assert kv_bytes(model) == 832 * TOKEN_BYTES  # of 828 tokens, in granules of 64
    model.rebalance(ll.Plan.from_spans([("d", 0, 2), ("b", 2, 4)]))
    assert kv_bytes(model) == 832 * TOKEN_BYTES
    # A second call goes on from there, and says anew how many may come.
    going_on = {"past_key_values": output.past_key_values, "max_new_tokens": 200}
    output = generate(model, output.sequences, **going_on)
    going_on["past_key_values"] = expected.past_key_values
    assert torch.equal(output.sequences, generate(unsharded, expected.sequences, **going_on).sequences)
    assert kv_bytes(model) == 1088 * TOKEN_BYTES  # of 1,028 tokens


def test_what_was_said_moves_along(place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel) -> None:
    model, prompt = place(tiny_llama, SPANS), torch.arange(100)[None] % 120 + 3

    class MovingHalfway:
        """A streamer that moves the model while it generates."""

        num_seen = 0

        def put(self, _tokens: torch.Tensor) -> None:
            self.num_seen += 1
            if self.num_seen == 50:
                model.rebalance(ll.Plan.from_spans([("d", 0, 2), ("b", 2, 4)]))

        def end(self) -> None:
            pass

    output = generate(model, prompt, max_new_tokens=190, streamer=MovingHalfway())
    assert torch.equal(output.sequences, generate(unsharded, prompt, max_new_tokens=190).sequences)
    assert model.plan.devices == ("d", "b")
    assert kv_bytes(model) == 320 * TOKEN_BYTES  # of 289 tokens: 128, 256, and then no doubling


def test_an_answer_that_may_be_long_and_ends_early(
    place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    model, prompt = place(tiny_llama, SPANS), torch.arange(100)[None] % 120 + 3
    (third,) = generate(unsharded, prompt).sequences[:, 102].tolist()
    arguments = {"max_new_tokens": 10**9, "eos_token_id": third}
    output = model.generate(prompt, **arguments, return_dict_in_generate=True, do_sample=False)
    assert torch.equal(output.sequences, unsharded.generate(prompt, **arguments, do_sample=False))
    assert kv_bytes(model) <= 128 * TOKEN_BYTES


@pytest.mark.parametrize(
    "arguments", [{"num_beams": 3}, {"prefill_chunk_size": 64}, {"prompt_lookup_num_tokens": 4}], ids=str
)
def test_other_ways_to_generate(
    arguments: dict[str, Any], place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    model, prompt = place(tiny_llama, SPANS), torch.arange(200)[None] % 120 + 3
    output = generate(model, prompt, **arguments)
    assert torch.equal(output.sequences, generate(unsharded, prompt, **arguments).sequences)
    assert kv_bytes(model) <= arguments.get("num_beams", 1) * 320 * TOKEN_BYTES  # of 228 tokens, and candidates


def test_buffers_do_not_double_beyond_a_devices_memory() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=128,
    )
    token_bytes = 8 * 2 * 2 * 32 * 128 * 4  # rows x layers x keys and values x heads x dim x float32
    with (
        ll.Cluster([ll.Device(name="small", threads=1, memory=600 * token_bytes)]) as cluster,
        ll.ShardedModel.from_pretrained(
            "none", config=config, load_format="dummy", dtype="float32", cluster=cluster, plan="even", progress=False
        ) as model,
    ):
        past = None
        for _ in range(11):  # the last ones beyond 512 tokens: no room for 1,024
            past = model(torch.ones((8, 50), dtype=torch.long), past_key_values=past, logits_to_keep=1).past_key_values
        assert past.get_seq_length() == 550
        assert kv_bytes(model) == 640 * token_bytes
        static = StaticCache(config=model.config, max_cache_len=1_000)
        with pytest.raises(ll.DeviceMemoryError, match="can't allocate memory"):
            model(torch.ones((8, 50), dtype=torch.long), past_key_values=static)
        assert (
            model(torch.ones((8, 50), dtype=torch.long), past_key_values=past).past_key_values.get_seq_length() == 600
        )

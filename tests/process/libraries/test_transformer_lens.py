"""TransformerLens' bridge around a sharded model gives what it gives around the uncut one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lingualinked as ll
from process.conftest import load_unsharded
from process.libraries.conftest import Compare, make_compare

bridges = pytest.importorskip("transformer_lens.model_bridge")

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8]])
OTHER = torch.tensor([[1, 27, 13, 44, 9]])


@pytest.fixture(scope="module")
def bridged(
    shared_cluster: ll.Cluster,
    tiny_llama: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Compare]:
    """Compare what a script returns that is given a bridge around each model; the bridge computes attention itself."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    options = {"attn_implementation": "eager", "use_cache": False}
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])

    def bridge(model: Any) -> Any:
        return bridges.TransformerBridge.boot_transformers(
            tiny_llama, hf_model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
        )

    with ll.ShardedModel.from_pretrained(
        tiny_llama, cluster=shared_cluster, plan=plan, progress=False, **options
    ) as sharded:
        yield make_compare(bridge(sharded), bridge(load_unsharded(tiny_llama, **options)))


def test_logits_and_loss(bridged: Compare) -> None:
    bridged(lambda bridge: [bridge(IDS), bridge("the quick brown fox"), bridge(IDS, return_type="loss")])


@torch.no_grad()
def test_every_activation_is_cached(bridged: Compare) -> None:
    def script(bridge: Any) -> Any:
        logits, cache = bridge.run_with_cache(IDS)
        assert len(cache) > 100
        residuals = cache.accumulated_resid(layer=-1, incl_mid=False)
        return [logits, residuals, *((name, cache[name]) for name in sorted(cache))]

    bridged(script)


def halve(activation: Tensor, hook: Any) -> Tensor:
    return activation * 0.5


def ablate_a_head(heads: Tensor, hook: Any) -> Tensor:
    heads[:, :, 2] = 0
    return heads


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("blocks.1.hook_resid_pre", halve),
        ("blocks.1.mlp.hook_out", halve),
        ("blocks.2.attn.hook_pattern", halve),
        ("blocks.2.attn.hook_z", ablate_a_head),
        ("blocks.3.ln2.hook_out", halve),
        ("unembed.hook_in", halve),
    ],
)
def test_activations_are_changed(bridged: Compare, name: str, function: Callable[..., Tensor]) -> None:
    bridged(lambda bridge: [bridge.run_with_hooks(IDS, fwd_hooks=[(name, function)]), bridge(IDS)])


@torch.no_grad()
def test_activations_are_patched_from_another_input(bridged: Compare) -> None:
    def script(bridge: Any) -> Any:
        _, clean = bridge.run_with_cache(OTHER)

        def patch(residual: Tensor, hook: Any) -> Tensor:
            residual[:, 3] = clean[hook.name][:, 3]
            return residual

        return [bridge.run_with_hooks(IDS, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)]) for layer in range(4)]

    bridged(script)


@torch.no_grad()
def test_weights_are_read_a_pass_stops_early_and_tokens_are_generated(bridged: Compare) -> None:
    def script(bridge: Any) -> Any:
        generated = bridge.generate(
            IDS, max_new_tokens=3, do_sample=False, use_past_kv_cache=False, verbose=False, return_type="tokens"
        )
        return [bridge.W_U, bridge.W_E, bridge.blocks[1].attn.W_Q, bridge(IDS, stop_at_layer=2), generated, bridge(IDS)]

    bridged(script)


def test_attention_of_the_bridge_can_not_write_kv_which_is_said(bridged: Compare) -> None:
    def script(bridge: Any) -> Any:
        if not isinstance(bridge.original_model, ll.ShardedModel):
            return "refused"
        with torch.no_grad(), pytest.raises(ll.UnsupportedOperationError, match="use_cache=False"):
            bridge.generate(IDS, max_new_tokens=2, do_sample=False, verbose=False)
        return "refused"

    bridged(script)

"""Attention for decoding has the bits of torch's own, whichever of the two computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from families import tiny_config
from lingualinked.kernels import attention
from lingualinked.model.exact import exact_attention
from lingualinked.model.exact.exact_attention import attend, cancelling_scores, cancelling_values, is_exact
from lingualinked.model.hf_internals import torch_attention
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stage import Stage, StageInputs

needs_kernel = pytest.mark.skipif(not is_exact(64, 1, torch.get_num_threads()), reason="torch attends otherwise here")

States = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def layer(group: int) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = group
    return module


def random_states(heads: int, group: int, tokens: int, dim: int, *, new: int = 1, rows: int = 2) -> States:
    queries = torch.randn(rows, new, heads, dim).transpose(1, 2)
    keys, values = torch.randn(2, rows, heads // group, tokens + 5, dim)[:, :, :, 2 : 2 + tokens]  # as in a KV cache
    return queries.bfloat16(), keys.bfloat16(), values.bfloat16()


def check(states: States, group: int = 1, mask: Tensor | None = None, scaling: float | None = None) -> None:
    (ours, _), (theirs, _) = (
        function(layer(group), *states, mask, scaling=scaling, dropout=0.0) for function in (attend, torch_attention)
    )
    assert ours.shape == theirs.shape
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7).view(torch.int16), theirs.nan_to_num(7).view(torch.int16))


@settings(deadline=None, max_examples=30)
@given(
    group=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([8, 16, 24, 40, 64, 80, 96, 128, 256, 20, 288]),
    tokens=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1025, 1700])),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_has_torchs_bits(group: int, dim: int, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    check(random_states(4, group, tokens, dim), group)


@pytest.mark.parametrize("make", [cancelling_scores, cancelling_values])
@pytest.mark.parametrize("tokens", [1, 18, 700])
def test_what_shows_every_order_has_torchs_bits(
    make: Callable[[int, int, int, torch.Generator], exact_attention.Attention], tokens: int
) -> None:
    *states, scale = make(64, 2, tokens, torch.Generator().manual_seed(1))
    query, keys, values = states
    check((query, keys.expand(len(query), -1, -1, -1), values.expand(len(query), -1, -1, -1)), 2, scaling=scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 1e-40, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("tokens", [3, 20, 600])
def test_unusual_values_come_out_as_torchs(value: float, which: int, everywhere: bool, tokens: int) -> None:
    torch.manual_seed(0)
    states = random_states(4, 1, tokens, 64)
    states[which][:, :, slice(None) if everywhere else -1, 3] = value
    check(states)


def test_what_the_kernel_does_not_compute_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(attention, "attend", fail)
    states = random_states(4, 2, 9, 64)
    check(states, 2, mask=torch.rand(2, 1, 1, 9) < 0.5)
    check(random_states(4, 2, 9, 64, new=3), 2)
    query, keys, values = states
    check((query, keys.transpose(2, 3).contiguous().transpose(2, 3), values), 2)
    with sdpa_kernel(SDPBackend.MATH):
        check(states, 2)
    floats = [each.float() for each in states]
    assert torch.equal(*(function(layer(2), *floats, None)[0] for function in (attend, torch_attention)))


def test_another_order_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that shortens every sum by its last bit, which changes hardly any result, is refused."""
    real = attention.attend

    def wrong(query: Tensor, keys: Tensor, values: Tensor, scale: float, logsums: Tensor | None = None) -> Tensor:
        result = real(query, keys, values, scale, logsums)
        if logsums is not None:
            logsums.copy_(torch.nextafter(logsums, torch.tensor(-math.inf)))
        return result

    monkeypatch.setattr(attention, "attend", wrong)
    is_exact.cache_clear()
    assert not is_exact(64, 1, torch.get_num_threads())
    is_exact.cache_clear()


@needs_kernel
def test_a_stage_decodes_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called, real = [], attention.attend

    def record(*args: Any) -> Tensor:
        called.append(args[1].shape[2])
        return real(*args)

    config = tiny_config("llama").to_json_string(use_diff=False)
    spec = ModelSpec(
        class_name="LlamaForCausalLM",
        config_json=config,
        dtype="bfloat16",
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )
    stage = Stage.load(spec, 0, 2)
    cache = stage.new_cache()
    is_exact(stage._config.head_dim, 2, torch.get_num_threads())
    monkeypatch.setattr(attention, "attend", record)
    for num_tokens in (5, 1):
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        stage.step(StageInputs(tensors=(ids,), layout=None, attention_mask=None, position_ids=None), cache)
    assert called == [6, 6]  # one new token, in two layers

"""Attention for decoding has the bits of torch's own, whichever of the two computes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conversations import dummy_spec
from kernel_checks import threads
from lingualinked.kernels import attention
from lingualinked.model.exact import exact_attention
from lingualinked.model.exact.exact_attention import attend, is_exact
from lingualinked.model.hf_internals.computing import torch_attention
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs

pytestmark = pytest.mark.slow

needs_kernel = pytest.mark.skipif(
    not is_exact(torch.bfloat16, 64, 1, 1, False, torch.get_num_threads()), reason="torch attends otherwise here"
)

States = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def layer(group: int) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = group
    return module


def random_states(
    heads: int, group: int, tokens: int, dim: int, *, new: int = 1, rows: int = 2, dtype: torch.dtype = torch.bfloat16
) -> States:
    queries = torch.randn(rows, new, heads, dim).transpose(1, 2)
    keys, values = torch.randn(2, rows, heads // group, tokens + 5, dim)[:, :, :, 2 : 2 + tokens]  # as in a KV cache
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def random_mask(kind: str, states: States) -> Tensor | None:
    """Make a mask as transformers makes it for padded rows, for rows that are not, or one that is added to scores."""
    query, keys, _ = states
    num_rows, num_heads, num_new, _ = query.shape
    num_tokens = keys.shape[2]
    if kind == "none":
        return None
    if kind == "padded":  # on the left; tokens see what lies before them
        starts = torch.randint(num_tokens, (num_rows, 1, 1, 1))
        places, ends = torch.arange(num_tokens), num_tokens - num_new + torch.arange(num_new)[:, None]
        return (places >= starts) & (places <= ends)
    if kind == "choices":
        return torch.rand(num_rows, num_heads, num_new, num_tokens) < 0.7
    return torch.randn(1, 1, num_new, num_tokens).to(query.dtype)


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
    dim=st.sampled_from([8, 16, 24, 64, 80, 128, 208, 256, 20, 288]),
    tokens=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1025, 1700])),
    new=st.sampled_from([1, 1, 2, 3, 4, 9, 17, 32, 33, 36, 64, 100, 128, 192, 260]),
    mask=st.sampled_from(["none", "padded", "choices", "addends"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_has_torchs_bits(
    group: int, dim: int, tokens: int, new: int, mask: str, dtype: torch.dtype, num_threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    states = random_states(4, group, tokens, dim, new=new, dtype=dtype)
    with threads(num_threads):
        check(states, group, random_mask(mask, states))


@settings(deadline=None, max_examples=30)
@given(
    group=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([16, 64, 80, 128]),
    tokens=st.one_of(st.integers(2, 130), st.sampled_from([191, 192, 196, 255, 511, 512, 516, 640, 767])),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    num_threads=st.sampled_from([1, 2]),
    value=st.sampled_from([None, math.nan, math.inf, -math.inf, -0.0, 1e-40, 3e38]),
    which=st.integers(0, 2),
    place=st.sampled_from([-1, -10, 0]),
    seed=st.integers(0, 1 << 30),
)
def test_whole_prompts_have_torchs_bits(
    group: int,
    dim: int,
    tokens: int,
    dtype: torch.dtype,
    num_threads: int,
    value: float | None,
    which: int,
    place: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    states = random_states(4, group, tokens, dim, new=tokens, dtype=dtype)
    if value is not None:
        states[which][:, :, max(place, -tokens), 3] = value
    with threads(num_threads):
        check(states, group)


@needs_kernel
def test_a_whole_prompt_has_the_kernel() -> None:
    prompt = random_states(4, 2, 40, 64, new=40)
    assert exact_attention.uses_kernel(layer(2), *prompt, None)
    assert not exact_attention.uses_kernel(layer(2), *random_states(4, 2, 41, 64, new=40), None)
    assert not exact_attention.uses_kernel(layer(2), *random_states(4, 2, 9, 64, new=9), None)


@pytest.mark.parametrize("make", [exact_attention.cancelling_scores, exact_attention.cancelling_values])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "new"), [(1, 1), (18, 1), (700, 3), (700, 40), (551, 200)])
def test_what_shows_every_order_has_torchs_bits(
    make: exact_attention.MakeAttention, mask_dtype: torch.dtype | None, tokens: int, new: int
) -> None:
    shape = exact_attention.Shape(torch.bfloat16, 4, 2, new, 64)
    query, keys, values, scale, mask = make(shape, tokens, mask_dtype, torch.Generator().manual_seed(1))
    check((query, keys.expand(4, -1, -1, -1), values.expand(4, -1, -1, -1)), 2, mask, scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 1e-40, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("tokens", [3, 20, 600])
@pytest.mark.parametrize(("new", "mask"), [(1, "none"), (1, "padded"), (3, "choices"), (5, "addends"), (100, "padded")])
def test_unusual_values_come_out_as_torchs(
    value: float, which: int, everywhere: bool, tokens: int, new: int, mask: str
) -> None:
    torch.manual_seed(0)
    states = random_states(4, 1, tokens, 64, new=new)
    states[which][:, :, slice(None) if everywhere else -1, 3] = value
    check(states, mask=random_mask(mask, states))


def test_what_the_kernel_does_not_compute_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(attention, "attend", fail)
    states = random_states(4, 2, 9, 64)
    check(random_states(4, 2, 9, 64, new=3), 2)  # a prompt
    check(random_states(4, 2, 40, 64, new=35), 2, torch.rand(2, 1, 35, 40) < 0.5)  # three queries are left over
    check(random_states(4, 2, 800, 64, new=768), 2, torch.rand(1, 1, 768, 800) < 0.5)
    check(random_states(4, 2, 9, 8, new=2), 2, torch.rand(2, 1, 2, 9) < 0.5)
    check(states, 2, torch.rand(2, 9, 1, 1).expand(-1, -1, 1, 1).transpose(1, 3).float())
    prompt = random_states(4, 2, 40, 64, new=40)
    check(prompt, 2, scaling=-0.5)
    looks_ahead = layer(2)
    looks_ahead.is_causal = False  # type: ignore[assignment]
    assert torch.equal(*(function(looks_ahead, *prompt, None)[0] for function in (attend, torch_attention)))
    assert torch.equal(
        *(function(layer(2), *prompt, None, is_causal=False)[0] for function in (attend, torch_attention))
    )
    query, keys, values = states
    check((query, keys.transpose(2, 3).contiguous().transpose(2, 3), values), 2)
    with sdpa_kernel(SDPBackend.MATH):
        check(states, 2)
    floats = [each.float() for each in states]
    assert torch.equal(*(function(layer(2), *floats, None)[0] for function in (attend, torch_attention)))


@needs_kernel
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_stage_decodes_with_the_kernel(is_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called, real = [], attention.attend

    def record(*args: Any) -> Tensor:
        called.append(tuple(args[index].shape[2] for index in (0, 1)))
        return real(*args)

    stage = Stage.load(dummy_spec("llama-wide", "bfloat16"), 0, 2)
    cache = stage.new_cache()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for num_new in (1, 3):
        is_exact(torch.bfloat16, stage._config.head_dim, 2, num_new, num_new > 1 or is_padded, torch.get_num_threads())
    monkeypatch.setattr(attention, "attend", record)
    num_seen = 0
    for num_tokens in (5, 1, 3):  # a prompt, a token, a token with two drafts
        num_seen += num_tokens
        ids = torch.zeros(2, num_tokens, dtype=torch.long)
        seen = mask[:, :num_seen] if is_padded else None
        stage.step(StageInputs(tensors=(ids,), layout=None, attention_mask=seen, position_ids=None), cache)
    decoding = [(1, 6), (1, 6), (3, 9), (3, 9)]  # new tokens and all, in two layers
    assert called[-4:] == decoding  # after a padded prompt, which is as short, and what it is probed with

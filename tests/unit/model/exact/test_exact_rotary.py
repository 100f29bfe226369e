"""Rotary embeddings have the bits of the models' own functions, whichever of the two computes them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from kernel_checks import run_elsewhere
from lingualinked.kernels import rotary
from lingualinked.model.exact import exact_rotary
from lingualinked.model.exact.exact_rotary import faster_rotation
from lingualinked.model.process.torch_settings import torch_settings

FAMILIES = ("cohere", "falcon", "gemma3", "gpt_neox", "llama", "olmo", "phi3", "qwen2_moe", "stablelm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 1e-7, -3e38, 65504.0)
SCRIPT = """
import test_exact_rotary as tests
for dtype in tests.DTYPES:
    tests.check("llama", tests.drawn(2, 4, 2, 64, dtype, seed=1))
"""

needs_kernel = pytest.mark.skipif(not rotary.is_available(), reason="this processor does not run the kernel")


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    exact_rotary._is_exact.cache_clear()
    with torch.inference_mode():
        yield
    exact_rotary._is_exact.cache_clear()
    torch.set_num_threads(1)


def rotation(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb


def drawn(
    rows: int,
    heads: int,
    key_heads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    tokens: int = 1,
    angles: int = 1,
    power: int = 0,
    seed: int = 0,
) -> list[Tensor]:
    """Queries and keys as projections give them, and angles."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, tokens, heads, dim), (rows, tokens, key_heads, dim), *[(angles, tokens, dim)] * 2]
    queries, keys, cosines, sines = (torch.randn(size, generator=generator) for size in sizes)
    queries *= 2.0**power
    return [each.to(dtype) for each in (queries.transpose(1, 2), keys.transpose(1, 2), cosines, sines)]


def check(family: str, states: list[Tensor]) -> None:
    own = rotation(family)
    for ours, theirs in zip(faster_rotation(own)(*states), own(*states), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        strides = [  # on which torch's attention may depend
            [stride for stride, size in zip(each.stride(), each.shape, strict=True) if size > 1]
            for each in (ours, theirs)
        ]
        assert ours.shape[2] == 1 or strides[0] == strides[1]
        assert torch.equal(ours.isnan(), theirs.isnan())
        found, expected = (each.masked_fill(each.isnan(), 7).contiguous() for each in (ours, theirs))
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@given(
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 16),
    heads=st.integers(1, 8),
    key_heads=st.integers(1, 3),
    dim=st.one_of(st.sampled_from([16, 32, 64, 80, 96, 128, 256]), st.integers(1, 40).map(lambda half: 2 * half)),
    tokens=st.sampled_from([1, 1, 1, 3]),
    has_own_angles=st.booleans(),
    power=st.integers(-130, 100),
    num_threads=st.integers(1, 3),
    special=st.lists(st.sampled_from(SPECIAL), max_size=4),
    seed=st.integers(0, 1 << 32),
)
@example("gpt_neox", torch.bfloat16, 1, 2, 1, 16, 3, False, 0, 1, [], 0)
@settings(max_examples=60)
def test_bits_in_all_shapes_and_magnitudes(
    family: str,
    dtype: torch.dtype,
    rows: int,
    heads: int,
    key_heads: int,
    dim: int,
    tokens: int,
    has_own_angles: bool,
    power: int,
    num_threads: int,
    special: list[float],
    seed: int,
) -> None:
    torch.set_num_threads(num_threads)
    angles = rows if has_own_angles else 1
    states = drawn(rows, heads, key_heads, dim, dtype, tokens=tokens, angles=angles, power=power, seed=seed)
    with torch.inference_mode():
        check(family, states)
        for index, value in enumerate(special):
            states[index][-1, ..., seed % dim] = value
            check(family, states)


@needs_kernel
def test_another_instruction_set() -> None:
    run_elsewhere(SCRIPT, Path(__file__).parent, ATEN_CPU_CAPABILITY="avx2")


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_which_functions_the_kernel_replaces(dtype: torch.dtype) -> None:
    queries, keys, cosines, _ = drawn(2, 4, 2, 64, dtype)
    for family in FAMILIES:
        found = exact_rotary._is_exact(rotation(family), dtype, queries.shape, keys.shape, cosines.shape, 1)
        assert found == (family != "cohere")  # which rotates neighbours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals_are_flushed_where_torch_flushes_them(dtype: torch.dtype) -> None:
    with torch_settings({"flush_denormal": True}):
        for power in (-126, -120, -24, -14, 0):
            check("llama", drawn(2, 4, 2, 32, dtype, power=power))


def fused(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate without rounding products."""
    results = []
    for states in (queries, keys):
        first, second = states.double().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        results.append(
            (states.double() * cosines.double()[:, None] + turned * sines.double()[:, None]).to(states.dtype)
        )
    return tuple(results)  # type: ignore[return-value]


def opposite(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    own: tuple[Tensor, Tensor] = rotation("llama")(queries, keys, cosines, -sines)
    return own


def first_of_keys(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    own = rotation("llama")(queries, keys, cosines, sines)
    return own[0], own[1].expand(-1, -1, -1, -1).roll(1, 1) if keys.shape[1] > 1 else own[1] + 1


@pytest.mark.parametrize("wrong", [fused, opposite, first_of_keys])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_the_probe_refuses_what_rounds_otherwise(
    wrong: Any, dtype: torch.dtype, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "is_available", lambda: True)
    states = drawn(1, heads, heads, 16, dtype)
    shapes = [each.shape for each in states[:3]]
    for kernel, is_exact in ((rotation("llama"), True), (wrong, False)):
        monkeypatch.setattr(rotary, "rotate", kernel)
        exact_rotary._is_exact.cache_clear()
        assert exact_rotary._is_exact(rotation("llama"), dtype, *shapes, 1) == is_exact


def test_what_the_kernel_does_not_compute_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = rotation("llama")
    faster = faster_rotation(own)
    states: Any = drawn(2, 4, 2, 32, torch.bfloat16)
    monkeypatch.setattr(rotary, "rotate", lambda *_: pytest.fail("the rotation is not the model's"))
    check("llama", drawn(2, 4, 2, 32, torch.bfloat16, tokens=2))
    check("llama", [each[..., ::2] for each in drawn(2, 4, 2, 64, torch.bfloat16)])
    check("llama", [*states[:2], *(each.float() for each in states[2:])])
    assert all(map(torch.equal, faster(*states, unsqueeze_dim=1), own(*states)))
    assert all(map(torch.equal, faster(*states, 1), own(*states)))
    with torch.autocast("cpu", torch.bfloat16):
        check("llama", states)
    with torch.inference_mode(False), torch.enable_grad():
        check("llama", drawn(2, 4, 2, 32, torch.bfloat16))

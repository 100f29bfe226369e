"""How torch rounds is found by trying: what differs is noticed, and rows that are called independent are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernel_checks import threads
from lingualinked.model.exact import rounding_probe
from lingualinked.model.exact.rounding_probe import probe_rounding
from lingualinked.rounding import Rounding, describe_difference, independent_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_called_independent_are(dtype: torch.dtype) -> None:
    least = probe_rounding(dtype, torch.get_num_threads()).independent_rows
    if not least:
        pytest.skip("rows of a batch depend on each other here")
    generator = torch.Generator().manual_seed(5)
    for num_in, num_out in ((64, 192), (768, 200), (2048, 96)):
        rows = torch.randn((32, num_in), generator=generator).to(dtype)
        weight = torch.randn((num_out, num_in), generator=generator).to(dtype)
        whole = functional.linear(rows, weight)
        for count in (least, least + 1, 2 * least + 1):
            for start in range(0, 32 - count, count):
                part = functional.linear(rows[start : start + count].contiguous(), weight)
                assert torch.equal(part, whole[start : start + count]), (num_in, num_out, count)


@pytest.mark.parametrize(("dtype", "num_queries"), [(torch.float16, 0), (torch.bfloat16, 0), (torch.bfloat16, 3)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_of_attention_that_are_called_independent_are(
    dtype: torch.dtype, num_queries: int, num_threads: int
) -> None:
    """With several threads, where torch's buffer lies may decide how it adds values."""
    with threads(num_threads):
        least = probe_rounding(dtype, num_threads, (num_queries,) if num_queries else ()).independent_rows
        states = torch.randn((3, 8, 2, 600, 64), generator=torch.Generator().manual_seed(3)).to(dtype)
        query, keys, values = states[0, :, :, : num_queries or 1], states[1], states[2]
        keys[:, :, 300:], values[:, :, 300:] = keys[:, :, :300], -values[:, :, :300]
        mask = torch.ones(8, 1, 1, 600, dtype=torch.bool) if num_queries else None
        whole = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        for count in range(least, 8) if least else ():
            part = None if mask is None else mask[-count:]
            found = functional.scaled_dot_product_attention(
                query[-count:], keys[-count:], values[-count:], attn_mask=part
            )
            assert torch.equal(found, whole[-count:]), count


def test_heads_that_share_keys_are_found() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity())
    for module, group in zip(model, (3, 1, 2), strict=True):
        module.num_key_value_groups = group
    assert rounding_probe.find_groups(model) == (2, 3)


def fresh_fingerprint(**variables: str) -> str:
    """Return the fingerprint that a new process finds under some variables of the environment."""
    code = (
        "import torch; torch.set_num_threads(1); from lingualinked.model.exact.rounding_probe import probe_rounding; "
        "print(*(probe_rounding(dtype, 1).fingerprint for dtype in (torch.bfloat16, torch.float32)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    return run.stdout.strip()


def test_another_instruction_set_is_another_fingerprint() -> None:
    here = fresh_fingerprint()
    assert fresh_fingerprint() == here
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert fresh_fingerprint(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2") != here


def test_a_row_that_depends_on_others_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
        result = functional.linear(rows[part], weight, bias)
        return result if len(result) >= 4 else result + 1

    monkeypatch.setattr(rounding_probe, "_linear", linear)
    probe_rounding.cache_clear()
    assert probe_rounding(torch.bfloat16, 1).independent_rows == 4
    monkeypatch.setattr(rounding_probe, "_linear", lambda rows, weight, bias, part: rows[part] * len(rows[part]))
    probe_rounding.cache_clear()
    assert probe_rounding(torch.bfloat16, 1).independent_rows == 0
    probe_rounding.cache_clear()


def test_the_workers_together() -> None:
    alike, other = Rounding("a", 2), Rounding("b", 4)
    assert describe_difference({"x": alike, "y": alike}) == ""
    assert describe_difference({"x": alike, "y": other, "z": alike}) == "'x', 'z' and 'y' sum in different orders"
    assert describe_difference({"x": alike, "y": Rounding("", 0)}) == ""
    assert independent_rows([alike, other]) == 4
    assert independent_rows([alike, Rounding("a", 0)]) == 0

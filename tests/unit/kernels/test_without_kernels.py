"""Where a kernel was not compiled, or the processor lacks its instructions, products and norms are torch's, and so are their bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lingualinked
from lingualinked.kernels import bfloat_rows, few_rows, float_rows, half_rows, native, norm, rotary
from lingualinked.model.exact import float_linear, norm_probe, packed_linear
from lingualinked.model.exact.exact_norm import speed_up_norms

PACKAGE = Path(lingualinked.__file__).parent
CACHES = (
    native.is_available,
    packed_linear._exact_kernel,
    float_linear._exact_kernel,
    norm_probe.find_kind,
)
COMPARE = """
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from lingualinked.kernels import bfloat_rows, few_rows, float_rows, half_rows, norm, rotary
from lingualinked.model.exact.exact_norm import speed_up_norms
from lingualinked.model.exact.float_linear import speed_up_linears
from lingualinked.model.exact.packed_linear import pack_linears
assert not any(kernel.is_available() for kernel in (bfloat_rows, few_rows, float_rows, half_rows, norm, rotary))
torch.set_num_threads(1)
for dtype in (torch.bfloat16, torch.float32, torch.float16):
    plain, layer = (nn.Sequential(LlamaRMSNorm(256), nn.Linear(256, 192)).to(dtype).eval() for _ in range(2))
    layer.load_state_dict(plain.state_dict())
    pack_linears(layer)
    speed_up_linears(layer)
    speed_up_norms(layer)
    for num_rows in (1, 3, 40):
        rows = torch.randn(num_rows, 256).to(dtype)
        with torch.inference_mode():
            assert torch.equal(layer(rows), plain(rows)), (dtype, num_rows)
"""


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def no_library(name: str) -> None:
    """Find no compiled kernel."""


def no_flags() -> frozenset[str]:
    return frozenset({"fpu", "avx2", "avx512f"})


@pytest.mark.parametrize(("name", "replacement"), [("load_library", no_library), ("processor_flags", no_flags)])
def test_products_are_torchs(name: str, replacement: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, name, replacement)
    assert not bfloat_rows.is_available()
    assert not few_rows.is_available()
    assert not float_rows.is_available()
    assert not half_rows.is_available()
    assert not norm.is_available()
    assert not rotary.is_available()
    normalise = LlamaRMSNorm(256).eval()
    speed_up_norms(normalise)
    assert type(normalise) is LlamaRMSNorm
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        plain = nn.Linear(256, 192).to(dtype)
        holder = nn.Sequential(plain)
        packed_linear.pack_linears(holder)
        float_linear.speed_up_linears(holder)
        layer = holder[0]
        for num_rows in (1, 2, 16):
            rows = torch.randn(num_rows, 256).to(dtype)
            with torch.inference_mode():
                assert torch.equal(layer(rows), plain(rows))
            if isinstance(layer, packed_linear.PackedLinear | float_linear.FloatLinear):
                assert not layer.kernel_name(num_rows).endswith(".c")


def test_a_package_without_compiled_kernels_computes_the_same(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "sample")
    shutil.copytree(PACKAGE, tmp_path / "lingualinked", ignore=ignored)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPARE], env=environment, check=True, cwd=tmp_path)

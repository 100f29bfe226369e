"""What a worker may use of a GPU, with torch's functions for GPUs replaced: limits, free and spare memory, and failures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lingualinked.worker.process import limits

GIB = 1 << 30


class FakeGpu:
    """A GPU of 80 GiB; other processes have taken `others`, and torch's allocator here holds 3 GiB, of which it uses 2."""

    others, reserved, allocated, fraction = 10 * GIB, 3 * GIB, 2 * GIB, 1.0
    total_memory = 80 * GIB

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, function in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_properties": lambda _: self,
            "mem_get_info": lambda _: (self.total_memory - self.others - self.reserved, self.total_memory),
            "memory_reserved": lambda _: self.reserved,
            "memory_allocated": lambda _: self.allocated,
            "set_per_process_memory_fraction": lambda fraction, _: setattr(self, "fraction", fraction),
            "get_per_process_memory_fraction": lambda _: self.fraction,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def test_the_limit_of_a_gpu_worker_is_set_in_torch_alone(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.setrlimit", None)  # CUDA reserves more addresses than any limit on memory allows
    monkeypatch.setattr(limits, "use_one_heap", lambda: None)
    limits.apply_limits(1, None, 20 * GIB, "cuda:0")
    assert 20 * GIB < gpu.fraction * gpu.total_memory <= 20.2 * GIB
    limits.apply_limits(1, None, 100 * GIB, "cuda:0")
    assert gpu.fraction == 1.0
    limits.apply_limits(1, None, 20 * GIB, "cuda:1")  # there is none: loading a stage will raise
    assert limits.free_bytes("cuda:1") == limits.spare_bytes("cuda:1") == 0


def test_what_the_allocator_holds_unused_is_free(gpu: FakeGpu) -> None:
    assert limits.free_bytes("cuda:0") == limits.spare_bytes("cuda:0") == 68 * GIB
    gpu.fraction = 0.25
    assert limits.spare_bytes("cuda:0") == 18 * GIB
    gpu.others = 70 * GIB
    assert limits.spare_bytes("cuda:0") == 8 * GIB
    gpu.fraction = 1 / 80
    assert limits.spare_bytes("cuda:0") == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("error: out of memory"), False),
    ],
    ids=str,
)
def test_failures_of_memory_are_told_from_others(error: Exception, expected: bool) -> None:
    assert limits.is_out_of_memory(error) is expected


def test_what_is_imported_before_workers_are_forked_asks_for_no_gpu() -> None:
    code = """
import torch
from torch import cuda
asked = []
cuda.is_available = cuda.device_count = cuda._lazy_init = lambda *_: asked.append(1) or 0
import lingualinked.worker.server
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MixtralForCausalLM
assert not asked and not cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_a_worker_whose_gpu_computes_nothing_more_ends(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _accelerator: None)
    limits.end_if_device_is_lost("cuda:0")

    def refuse(_accelerator: str) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    limits.end_if_device_is_lost("cpu")
    with pytest.raises(SystemExit, match="device-side assert"):
        limits.end_if_device_is_lost("cuda:0")

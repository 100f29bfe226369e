"""A stage computes under the settings of torch that its caller has, to the bits of the unsharded model under them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import accelerators
from conversations import Cut, Whole, load_stages, prompt, spec_of
from families import reference
from lingualinked.model.process.torch_settings import read_torch_settings

pytestmark = pytest.mark.equality

FAMILIES_TESTED = (
    "bloom",
    "falcon-7b",
    "gemma2",
    "gpt2",
    "llama",
    "opt-350m",
    "qwen2-moe",
)  # all pass; it takes minutes
Make = Callable[[], AbstractContextManager[object]]


@contextlib.contextmanager
def set_to(write: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):
            backend.fp32_precision = "none"


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return torch.autocast(accelerators.chosen.split(":")[0], dtype=dtype)


def cuda_matmul(name: str, value: bool) -> AbstractContextManager[object]:
    owner = torch.backends.cuda.matmul
    return set_to(lambda value: setattr(owner, name, value), value, not value)


SETTINGS: dict[str, Make] = {
    "autocast to bfloat16": lambda: autocast(torch.bfloat16),
    "autocast to float16": lambda: autocast(torch.float16),
    "sdpa in plain operations": lambda: sdpa_kernel(SDPBackend.MATH),
    "sdpa in preferred order": lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]),
    "no flash attention": lambda: set_to(torch.backends.cuda.enable_flash_sdp, False, True),
    "reduced math": lambda: set_to(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, True, False),
    "float64 by default": lambda: set_to(torch.set_default_dtype, torch.float64, torch.float32),
    "float32 matmul in bfloat16": lambda: matmul_precision("medium"),
    "without oneDNN": lambda: set_to(torch._C._set_mkldnn_enabled, False, True),
    "deterministic": lambda: set_to(torch.use_deterministic_algorithms, True, False),
    "denormals flushed": lambda: set_to(torch.set_flush_denormal, True, False),
    "inference mode": torch.inference_mode,
    "bfloat16 summed in float32": lambda: cuda_matmul("allow_bf16_reduced_precision_reduction", False),
    "float16 summed in float32": lambda: cuda_matmul("allow_fp16_reduced_precision_reduction", False),
    "float16 summed in float16": lambda: cuda_matmul("allow_fp16_accumulation", True),
}


def converse(conversation: Whole | Cut, makes: tuple[Make, Make]) -> list[Tensor] | str:
    """Run a prompt under some settings, and go on from it under others; give all logits, or what it fails with.

    Stages are told the settings of their caller, and are not called under them.
    """
    logits = []
    for make, tokens in zip(makes, (prompt(2, 7), prompt(2, 1)), strict=True):
        try:
            with contextlib.ExitStack() as settings:
                settings.enter_context(make())
                if isinstance(conversation, Cut):
                    conversation.torch_settings = read_torch_settings()
                    settings.close()
                logits.append(conversation.step(tokens, None, None))
        except RuntimeError as error:  # autocast to float16 has no kernel for some weights in bfloat16
            return str(error)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES_TESTED)
def test_bits_are_those_under_the_same_settings(
    family: str, dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family, dtype)
    model, stages = reference(folder), load_stages(spec_of(folder), 2, 4)
    plain: Make = contextlib.nullcontext
    for setting, make in SETTINGS.items():
        for makes in ((make, make), (make, plain), (plain, make)):
            ours, theirs = converse(Cut(stages), makes), converse(Whole(model), makes)
            if isinstance(theirs, str):  # where KV in bfloat16 and float16 meet, stages go on
                continue
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.dtype == other.dtype, setting
                assert torch.allclose(mine, other, rtol=0, atol=0, equal_nan=True), setting
    assert read_torch_settings() == {}


@pytest.mark.cpu_only(reason="which settings change bits was seen on CPUs")
def test_settings_change_bits(checkpoint: Callable[..., Path]) -> None:
    """The reason for sending them: each of these changes some model's bits, except one without effect on this processor."""
    plain: Make = contextlib.nullcontext
    changing = set()
    for family, dtype in (("mixtral", torch.float32), ("falcon-40b", torch.float32), ("falcon-7b", torch.bfloat16)):
        model = reference(checkpoint(family, dtype))
        without = converse(Whole(model), (plain, plain))[0]
        for setting, make in SETTINGS.items():
            logits = converse(Whole(model), (make, make))[0]
            if isinstance(logits, Tensor) and not torch.equal(logits, without):
                changing.add(setting)
    assert changing >= {"autocast to bfloat16", "sdpa in plain operations", "no flash attention", "without oneDNN"}

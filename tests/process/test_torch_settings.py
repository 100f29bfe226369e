"""Workers compute under the settings of torch that the caller calls under: the bits are those of the unsharded model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

import accelerators

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93], [1, 5, 6, 7, 8, 9, 10]])


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return torch.autocast(accelerators.chosen.split(":")[0], dtype=dtype)


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast to bfloat16": lambda: autocast(torch.bfloat16),
    "sdpa in plain operations": lambda: sdpa_kernel(SDPBackend.MATH),
    "float64 by default": float64_by_default,
    "all at once": lambda: both(autocast(torch.float16), sdpa_kernel(SDPBackend.MATH)),
}


@contextlib.contextmanager
def both(first: AbstractContextManager[object], second: AbstractContextManager[object]) -> Iterator[None]:
    with first, second:
        yield


@pytest.mark.parametrize("setting", SETTINGS)
def test_bits_are_those_of_the_unsharded_model(sharded: Any, unsharded: PreTrainedModel, setting: str) -> None:
    found = []
    for model in (sharded, unsharded):
        with torch.no_grad():
            with SETTINGS[setting]():
                prompt = model(IDS, labels=IDS)
            past = model(IDS[:, :1], past_key_values=prompt.past_key_values)
            with SETTINGS[setting]():
                tokens = model.generate(
                    IDS, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
                )
        found.append([prompt.logits, prompt.loss, past.logits, tokens.sequences, *tokens.scores])
    ours, theirs = found
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))

"""Threads that call ``generate`` at once get the tokens that each gets alone, though their steps run in one pass of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lingualinked as ll
from model_of_vectors import config_of_vectors

pytestmark = [pytest.mark.process, pytest.mark.equality]

PROMPTS = [torch.arange(3, 5 + 4 * number)[None] for number in range(1, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vectors")
    LlamaForCausalLM(config_of_vectors()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uncut(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(shared_fork_server: None, folder: Path) -> Iterator[Any]:
    devices = [ll.Device(name=name, threads=1, slowdown=3.0) for name in "ab"]  # so that steps wait
    with ll.ShardedModel.from_pretrained(folder, devices=devices, plan="even", progress=False) as model:
        yield model


def generate(model: Any, prompt: torch.Tensor, **changes: Any) -> list[int]:
    arguments = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **changes}
    tokens: list[int] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)[0].tolist()
    return tokens


def test_threads_at_once_get_what_each_gets_alone(model: Any, uncut: Any) -> None:
    torch.set_num_threads(1)
    changes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3}, {}, {"max_new_tokens": 9}, {"no_repeat_ngram_size": 2}, {"eos_token_id": 7}, {},
    ]  # fmt: skip
    expected = [generate(uncut, prompt, **each) for prompt, each in zip(PROMPTS, changes, strict=True)]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        futures = [pool.submit(generate, model, *pair[:1], **pair[1]) for pair in zip(PROMPTS, changes, strict=True)]
        assert [future.result() for future in futures] == expected


def test_a_batch_beside_them_changes_nothing(model: Any, uncut: Any) -> None:
    torch.set_num_threads(1)
    batch = torch.cat([PROMPTS[1], PROMPTS[1].flip(1)])
    expected = [generate(uncut, prompt) for prompt in [batch, *PROMPTS]]
    with ThreadPoolExecutor(len(expected)) as pool:
        assert list(pool.map(lambda prompt: generate(model, prompt), [batch, *PROMPTS])) == expected

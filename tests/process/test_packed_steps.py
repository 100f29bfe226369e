"""New tokens of several sessions in one pass: each text's logits are those of the text alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.cluster.packed_flight import PackedPart, PartReply
from lingualinked.model.packed.token_choice import TokenChoice

pytestmark = pytest.mark.process

PROMPTS = ([1, 17, 93], [5, 8, 33, 2, 71, 14, 60, 9], [44])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny("llama", torch.bfloat16, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def uncut(folder: Any) -> Any:
    return reference(folder)


@pytest.fixture(scope="module")
def model(shared_fork_server: None, folder: Any) -> Iterator[Any]:
    devices = [ll.Device(name=name, threads=1) for name in ("a", "b")]
    with ll.ShardedModel.from_pretrained(
        folder, devices=devices, plan="even", progress=False, max_kv_tokens=200
    ) as model:
        yield model


def alone(uncut: Any, prompt: list[int], num_new: int) -> list[Tensor]:
    """The last logits of a prompt and of greedy tokens after it, each step run as two equal rows: one has other bits."""
    torch.set_num_threads(1)
    rows, past, logits = torch.tensor([prompt, prompt]), None, []
    with torch.inference_mode():
        for _ in range(num_new):
            output = uncut(rows, past_key_values=past, use_cache=True)
            past, rows = output.past_key_values, output.logits[:, -1:].argmax(-1)
            logits.append(output.logits[0, -1])
    return logits


def run(model: Any, *parts: PackedPart) -> tuple[PartReply, ...]:
    return model._pipeline.packed_steps.start(parts).result()  # type: ignore[no-any-return]


def test_prompts_and_tokens_of_several_texts_run_together(model: Any, uncut: Any) -> None:
    expected = [alone(uncut, prompt, 4) for prompt in PROMPTS]
    sessions = [model._pipeline.open_session() for _ in PROMPTS]
    said: list[list[Tensor]] = [[] for _ in PROMPTS]
    for step in range(6):  # text n begins at step n
        parts, places = [], []
        for place, (session, prompt) in enumerate(zip(sessions, PROMPTS, strict=True)):
            if place <= step < place + 4:
                ids = prompt if place == step else [int(said[place][-1].argmax())]
                parts.append(PackedPart(session, ids))
                places.append(place)
        for place, reply in zip(places, run(model, *parts), strict=True):
            assert reply.error is None
            said[place].append(reply.logits[0])
    for ours, theirs in zip(said, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_the_last_stage_chooses_tokens(model: Any, uncut: Any) -> None:
    sessions = [model._pipeline.open_session() for _ in PROMPTS]
    parts = [
        PackedPart(sessions[0], PROMPTS[0], choice=TokenChoice()),
        PackedPart(sessions[1], PROMPTS[1], num_logits=2),
        PackedPart(sessions[2], PROMPTS[2], choice=TokenChoice(returns_logits=True, returns_logprob=True)),
    ]
    first, second, third = run(model, *parts)
    expected = [alone(uncut, prompt, 1)[0] for prompt in PROMPTS]
    assert first.token == int(expected[0].argmax())
    assert first.logits is None is first.logprob
    assert second.token is None
    assert second.logits.shape == (2, uncut.config.vocab_size)
    assert torch.equal(second.logits[1], expected[1])
    assert torch.equal(third.logits[0], expected[2])
    assert third.logprob == float(expected[2].float().log_softmax(-1).max())

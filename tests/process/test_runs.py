"""Tokens that the last stage chooses are those of the unsharded model, and random numbers go on where it would leave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lingualinked.cluster.engine import Engine

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
BATCH = torch.tensor([[0, 0, 1, 17, 93, 54], [1, 5, 6, 7, 8, 9], [0, 1, 101, 45, 45, 3]])
PADDED = {"input_ids": BATCH, "attention_mask": (BATCH != 0).long()}

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8, "top_k": 0},
    "min-p": {"min_p": 0.05, "top_k": 0},
    "top-h": {"top_h": 0.4, "top_k": 0},
    "typical": {"typical_p": 0.6, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.01, "top_k": 0},
    "eta": {"eta_cutoff": 0.01, "top_k": 0},
    "repetition": {"repetition_penalty": 1.4},
    "repetition of the prompt": {"encoder_repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "lengths": {"min_length": 20, "eos_token_id": [2, 45]},
    "new tokens": {"min_new_tokens": 9, "eos_token_id": [2, 45, 93]},
    "bad words": {"bad_words_ids": [[17], [93, 54], [3, 5, 8]]},
    "biases": {"sequence_bias": [[[17], 3.5], [[93, 54], -9.0]]},
    "forced end": {"forced_eos_token_id": 5},
    "forced beginning": {"forced_bos_token_id": 5},
    "decay": {"exponential_decay_length_penalty": (3, 1.2), "eos_token_id": 93},
    "suppressed": {"suppress_tokens": [17, 54], "begin_suppress_tokens": [93, 8]},
    "invalid values": {"remove_invalid_values": True},
    "all of them": {
        "temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3, "bad_words_ids": [[7]], "renormalize_logits": True,
    },
}  # fmt: skip


class Counted:
    """How many steps the caller has sent, and how many runs it has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = self.num_runs = 0
        send_step = Engine.step

        def step(engine: Engine, devices: Any, step: Any, tensors: Any, timeout_s: float, run: Any = None) -> Any:
            self.num_steps += run is None
            self.num_runs += run is not None
            return send_step(engine, devices, step, tensors, timeout_s, run)

        monkeypatch.setattr(Engine, "step", step)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def assert_alike(sharded: Any, unsharded: PreTrainedModel, num_microbatches: int | None = 1, **arguments: Any) -> Any:
    """Generate with both from the same seed; tokens and torch's generator afterwards are equal."""
    arguments = {"max_new_tokens": 16, "eos_token_id": None, **arguments}
    torch.manual_seed(7)
    expected = unsharded.generate(**arguments)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    ours = sharded.generate(**arguments, num_microbatches=num_microbatches)
    assert torch.equal(getattr(ours, "sequences", ours), getattr(expected, "sequences", expected))
    assert torch.equal(torch.get_rng_state(), state)
    return ours


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(sharded: Any, unsharded: PreTrainedModel, counted: Counted, name: str, do_sample: bool) -> None:
    prompt = PADDED if do_sample else {"input_ids": IDS}
    assert_alike(sharded, unsharded, **prompt, do_sample=do_sample, **SETTINGS[name])
    assert (counted.num_steps, counted.num_runs) == (0, 1)

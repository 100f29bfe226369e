"""Sessions of every kind of state, beside each other in threads, while layers move at random: each says what it says alone."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from custom_checkpoints import write_checkpoint
from families import reference
from stateful_families import CROPPABLE, KINDS, save_stateful
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality, pytest.mark.slow]

TEXT = torch.arange(150)[None] * 7 % 90 + 3
ROWS = torch.cat([TEXT[:, :9], TEXT[:, 20:29], TEXT[:, 50:59]])
PADDING = torch.ones_like(ROWS)
PADDING[1, :3] = PADDING[2, :6] = 0
MAX_MOVES = 12


def decode(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    given = {
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        **arguments,
    }
    output = model.generate(ids, output_scores=True, **given)
    return torch.cat([output.sequences.flatten().double(), *(each.flatten().double() for each in output.scores)])


def sample(model: Any) -> Tensor:
    torch.manual_seed(3)
    return decode(model, TEXT[:, 30:41], do_sample=True, top_k=20)


def step_by_step(model: Any) -> Tensor:
    """Prefill in two parts, and decode."""
    name, past, logits = "", None, []
    with torch.no_grad():
        for start, end in [(0, 5), (5, 12), *((at, at + 1) for at in range(12, 24))]:
            given = {} if past is None else {name: past}
            output = model(TEXT[:, start:end], use_cache=True, **given)
            name = next(each for each in ("past_key_values", "cache_params") if each in output)
            past = output[name]
            logits.append(output.logits)
    return torch.cat([each.flatten() for each in logits])


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "greedy": lambda model: decode(model, TEXT[:, :60]),  # beyond the positions that a stretched model has
    "padded": lambda model: decode(model, ROWS, attention_mask=PADDING),
    "beams": lambda model: decode(model, ROWS[:2], num_beams=3, num_return_sequences=2),
    "steps": step_by_step,
}
CROPPING = {"cropped": lambda model: decode(model, TEXT[:, :12].repeat(1, 2), prompt_lookup_num_tokens=3)}


def random_plan(rng: random.Random) -> ll.Plan:
    ends = [0, *sorted(rng.sample(range(1, 4), rng.randint(0, 2))), 4]
    devices = rng.sample("abcd", len(ends) - 1)
    return ll.Plan.from_spans([(device, ends[i], ends[i + 1]) for i, device in enumerate(devices)])


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_do_not_touch_each_other(kind: str, shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder, rng = save_stateful(kind, tmp_path), random.Random(kind)
    calls = CALLS | (CROPPING if kind in CROPPABLE else {})
    if kind == "in modules":  # whose class returns no cache to go on with
        del calls["steps"]
    arguments: dict[str, Any] = {"cluster": shared_cluster, "plan": random_plan(rng), "progress": False}
    check_calls(ll.ShardedModel.from_pretrained(folder, **arguments), reference(folder), calls, rng)


KEEPING = """
import torch
from torch import nn


class OwnLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.inner, self.outer = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.mean, self.num_passes = None, 0
        self.register_buffer("seen", torch.zeros(config.hidden_size))

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        if past_key_values is not None:
            past_key_values.update(hidden_states[:, None], hidden_states[:, None], self.layer_idx)
        self.num_passes += 1
        self.seen.add_(hidden_states.sum((0, 1)).tanh())
        mean = hidden_states.mean(1, keepdim=True)
        self.mean = mean if self.mean is None or len(mean) != len(self.mean) else (self.mean + mean) / 2
        mixed = self.inner(hidden_states) + self.mean + self.seen / self.num_passes
        return (hidden_states + self.outer(mixed.tanh())).tanh()
"""


def test_code_of_a_checkpoint_that_keeps_what_it_has_seen(
    shared_fork_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("custom_checkpoints.LAYER", KEEPING)
    whole, rng = write_checkpoint(tmp_path / "keeping"), random.Random(1)
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "abcd"]) as cluster:
        model = ll.ShardedModel.from_pretrained(
            tmp_path / "keeping", cluster=cluster, plan=random_plan(rng), trust_remote_code=True, progress=False
        )
        check_calls(model, whole, CALLS, rng)


def check_calls(model: Any, whole: Any, calls: dict[str, Callable[[Any], Tensor]], rng: random.Random) -> None:
    """Make all calls at once, each in a thread, while the model's layers move; compare with a model of its own for each."""
    expected = {name: call(copy.deepcopy(whole)) for name, call in calls.items()}
    sampled = sample(copy.deepcopy(whole))
    with model, ThreadPoolExecutor(len(calls) + 1) as threads:
        running = {name: threads.submit(call, model) for name, call in calls.items()}

        def move() -> int:
            num_moves = 0
            while num_moves < MAX_MOVES and not all(each.done() for each in running.values()):
                model.rebalance(random_plan(rng))
                num_moves += 1
            return num_moves

        moving = threads.submit(move)
        found = sample(model)  # in the thread whose random numbers these are
        assert moving.result() > 0
        assert torch.equal(found, sampled)
        for name, call in running.items():
            assert torch.equal(call.result(), expected[name]), name
        running.clear()
        del call
        gc.collect()
        wait_until(lambda: not any(num_sessions(model)))

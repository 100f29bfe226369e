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
            output = model(TEXT[:, start:end], **given)
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
    whole = reference(folder)
    calls = CALLS | (CROPPING if kind in CROPPABLE else {})
    if kind == "in modules":  # whose class returns no cache to go on with
        del calls["steps"]
    expected = {name: call(copy.deepcopy(whole)) for name, call in calls.items()}
    sampled = sample(copy.deepcopy(whole))
    plan = random_plan(rng)
    model: Any = ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False)
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

"""Plans over a GPU and the CPU give the bits of an uncut model whose layers are on the same devices, while layers move too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import accelerators
import lingualinked as ll
from families import save_tiny
from spread_model import SpreadModel

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93], [1, 5, 6, 7, 8, 9, 10]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral")  # full attention, sliding windows, tied ends, experts
Spans = list[tuple[str, int, int]]
PLANS: list[Spans] = [
    [("gpu", 0, 2), ("host", 2, 4)],
    [("host", 0, 1), ("gpu", 1, 4)],
    [("gpu", 0, 1), ("host", 1, 3), ("gpu", 3, 4)],
    [("host", 0, 4)],
    [("gpu", 0, 1), ("other", 1, 4)],
]


@pytest.fixture(scope="module")
def mixed() -> Iterator[ll.Cluster]:
    """Two workers on one GPU, and one on the CPU."""
    devices = [accelerators.device("gpu"), accelerators.device("other"), ll.Device(name="host", threads=1)]
    with ll.Cluster(devices) as cluster:
        cluster.workers()
        yield cluster


def load(folder: Path, cluster: ll.Cluster, spans: Spans) -> Any:
    plan = ll.Plan.from_spans(spans)
    return ll.ShardedModel.from_pretrained(str(folder), cluster=cluster, plan=plan, progress=False)


def where(spans: Spans) -> list[str]:
    """Return the accelerator of each layer."""
    return ["cpu" if name == "host" else accelerators.chosen for name, start, end in spans for _ in range(start, end)]


@torch.no_grad()
def converse(model: Any, before_step: Callable[[int], None] = lambda _: None) -> list[torch.Tensor]:
    """Return the logits of a padded prompt and of steps that decode greedily."""
    mask, logits, past = MASK, [], None
    ids = IDS
    for step in range(9):
        before_step(step)
        positions = (mask.cumsum(-1) - 1).clamp(0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=past)
        logits.append(output.logits)
        past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return logits


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, other), f"step {step} differs by up to {(mine - other).abs().max()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_plans(family: str, dtype: torch.dtype, mixed: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny(family, dtype, tmp_path)
    spread = SpreadModel(folder)
    for spans in PLANS:
        spread.place_layers(where(spans))
        with load(folder, mixed, spans) as model:
            assert_equal(converse(model), converse(spread))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_kv_move_between_devices_in_the_middle(family: str, mixed: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny(family, torch.float32, tmp_path)
    spread = SpreadModel(folder)
    spread.place_layers(where(PLANS[0]))
    schedule = {2: PLANS[1], 3: PLANS[3], 5: PLANS[4], 6: PLANS[2], 8: PLANS[0]}
    with load(folder, mixed, PLANS[0]) as model:

        def move(step: int) -> None:
            if step in schedule:
                assert model.rebalance(ll.Plan.from_spans(schedule[step])).migration.kv_bytes > 0

        def move_whole(step: int) -> None:
            if step in schedule:
                spread.place_layers(where(schedule[step]))

        assert_equal(converse(model, move), converse(spread, move_whole))


def test_tokens_go_on_while_layers_move(mixed: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    with load(folder, mixed, PLANS[0]) as model, ThreadPoolExecutor(4) as pool:
        arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
        expected = model.generate(IDS, **arguments)
        running = [pool.submit(model.generate, IDS, **arguments) for _ in range(4)]
        for spans in (PLANS[2], PLANS[1], PLANS[4], PLANS[0]):
            model.rebalance(ll.Plan.from_spans(spans))
        # Devices round differently: what is asserted is that each of them gets an answer of the right shape and beginning.
        for each in running:
            tokens = each.result(60)
            assert tokens.shape == expected.shape
            assert torch.equal(tokens[:, : IDS.shape[1]], IDS)
        assert torch.equal(model.generate(IDS, **arguments), expected)


def test_the_plan_says_that_devices_round_differently(mixed: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    with load(folder, mixed, PLANS[0]) as model:
        assert model.plan.exact == (accelerators.chosen == "cpu")
        assert set(model.hf_device_map.values()) == {"cpu", accelerators.chosen}
        model.rebalance(ll.Plan.from_spans([("gpu", 0, 2), ("other", 2, 4)]))
        assert model.plan.exact

"""Hooks that block, call the model, end their step or outlast it: nothing hangs, no row is wrong, nothing stays in a worker.

``make soak-hooks`` repeats the threads with sessions of their own hundreds of times, while layers move.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from both_models import BothModels
from waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

NUM_ROUNDS = int(os.environ.get("LINGUALINKED_NUM_HOOK_ROUNDS", "2"))
IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()


@pytest.fixture
def llama(sharded: Any, unsharded: Any) -> BothModels:
    return BothModels(sharded, unsharded)


def num_threads_of_workers(model: ll.ShardedModel) -> list[int]:
    return [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in model.cluster.pids.values()]


def num_sessions(model: ll.ShardedModel) -> int:
    return sum(stage.num_sessions for stage in model.telemetry.stages)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, value: Tensor) -> Any:
    return value if isinstance(output, Tensor) else (value, *output[1:])


class OwnError(Exception):
    pass


@torch.no_grad()
def test_one_session_waits_in_a_hook_while_another_finishes(llama: BothModels) -> None:
    sharded, whole = llama.sharded, llama.uncut
    entered, go_on = threading.Event(), threading.Event()
    results: dict[str, Tensor] = {}

    def wait(_module: Any, _args: Any, output: Any) -> Any:
        entered.set()
        assert go_on.wait(60)
        return with_first(output, first(output) * 2)

    with sharded.model.layers[1].mlp.register_forward_hook(wait):
        thread = threading.Thread(target=lambda: results.update(hooked=sharded(IDS).logits))
        thread.start()
        assert entered.wait(60)
    results["plain"] = sharded(IDS).logits
    generated = sharded.generate(IDS, attention_mask=MASK, max_new_tokens=3)
    assert thread.is_alive()
    go_on.set()
    thread.join()
    assert torch.equal(results["plain"], whole(IDS).logits)
    assert torch.equal(generated, whole.generate(IDS, attention_mask=MASK, max_new_tokens=3))
    with whole.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: output * 2):
        assert torch.equal(results["hooked"], whole(IDS).logits)


class Soak:
    """Threads that generate with hooks on sessions of their own, each with its own strength of the hooks."""

    def __init__(self, whole: Any) -> None:
        self._strength = threading.local()
        with self.hooked(whole, once=False):
            self._expected = [self.generate(whole, strength) for strength in range(1, 9)]

    @contextlib.contextmanager
    def hooked(self, model: Any, *, once: bool = True) -> Iterator[None]:
        """Register hooks of several kinds, one that removes itself and registers another among them."""
        layers, handles = model.model.layers, contextlib.ExitStack()

        def removes_itself(*_: Any) -> None:
            handle.remove()
            handles.enter_context(layers[0].register_forward_hook(lambda *_: None))

        def multiply(_module: Any, _args: Any, output: Any) -> Any:
            return with_first(output, first(output) * self._strength.value)

        with handles:
            handles.enter_context(layers[1].register_forward_hook(multiply))
            handles.enter_context(layers[2].mlp.register_forward_pre_hook(lambda _, args: (args[0] + 0.5,)))
            handles.enter_context(ll.hook(layers[3], lambda value: value * self._strength.value, positions=-1))
            if once:
                handle = layers[3].mlp.register_forward_hook(removes_itself)
            yield

    def generate(self, model: Any, strength: int) -> Tensor:
        self._strength.value = strength
        tokens: Tensor = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4)
        return tokens

    def run_round(self, model: Any, pool: ThreadPoolExecutor) -> None:
        with self.hooked(model):
            ours = list(pool.map(lambda strength: self.generate(model, strength), range(1, 9)))
        assert all(map(torch.equal, ours, self._expected))


@pytest.mark.timeout(0 if NUM_ROUNDS > 50 else 300)
def test_eight_threads_with_hooks_on_their_own_sessions(
    place: Callable[..., Any], tiny_llama: str, unsharded: Any
) -> None:
    soak, model = Soak(unsharded), place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    spans = [[("a", 0, 1), ("b", 1, 3), ("c", 3, 4)], [("c", 0, 3), ("a", 3, 4)], [("b", 0, 4)]]
    moves: list[Any] = []
    with ThreadPoolExecutor(9) as pool:
        for number in range(NUM_ROUNDS):
            plan = ll.Plan.from_spans(spans[number % len(spans)])
            moves.append(pool.submit(model.rebalance, plan))
            soak.run_round(model, pool)
            moves.pop().result()
            wait_until(lambda: num_sessions(model) == 0)
            if NUM_ROUNDS > 50 and number % 10 == 9:
                sys.stdout.write(f"{number + 1} rounds of 8 threads with hooks while layers moved\n")
                sys.stdout.flush()


@torch.no_grad()
def test_a_hook_may_call_the_model_and_its_own_module(llama: BothModels) -> None:
    def run(model: Any) -> list[Any]:
        inner: list[Any] = []

        def ask(module: Any, args: Any, output: Any) -> Any:
            if not inner:
                inner.append(None)
                inner.append(model(IDS[1:]).logits)
                inner.append(module.forward(args[0] * 0.5))
                return output + inner[-1]
            return None

        with model.model.layers[2].mlp.register_forward_hook(ask):
            return [model(IDS).logits, *inner]

    llama.run(run)


@torch.no_grad()
def test_nothing_is_left_behind_by_a_hook_that_ends_its_step(llama: BothModels) -> None:
    sharded, whole = llama.sharded, llama.uncut
    cache = sharded(IDS).past_key_values

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = num_threads_of_workers(sharded)
    for error, hook in ((KeyboardInterrupt, interrupt), (OwnError, lambda *_: (_ for _ in ()).throw(OwnError()))):
        with sharded.model.layers[1].register_forward_pre_hook(hook), pytest.raises(error):
            sharded(IDS)
    with sharded.model.layers[3].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        sharded(IDS[:, :1], past_key_values=cache)
    with pytest.raises(ll.ClosedError, match="ended with KeyboardInterrupt"):
        sharded(IDS[:, :1], past_key_values=cache)
    assert torch.equal(sharded(IDS).logits, whole(IDS).logits)
    for _ in range(3):
        with sharded.model.layers[1].register_forward_hook(lambda *_: None):
            sharded(IDS)
    assert num_threads_of_workers(sharded) == before


@torch.no_grad()
def test_a_slow_hook_and_the_death_of_a_worker_end_the_step(tiny_llama: str) -> None:
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, devices=devices, plan=plan, progress=False) as model:
        with model.model.layers[0].register_forward_hook(lambda *_: None):
            model(IDS)  # afterwards each worker keeps one thread for steps with hooks
        cache, before = model(IDS).past_key_values, num_threads_of_workers(model)
        cache.session._timeout_s = 0.5

        def outstay(*_: Any) -> None:
            while not cache.session.ended:
                time.sleep(0.01)

        with (
            model.model.layers[1].mlp.register_forward_hook(outstay),
            pytest.raises(ll.StepTimeoutError, match=r"hooks of model.layers.1.mlp .* timeout_s=0.5"),
        ):
            model(IDS[:, :1], past_key_values=cache)

        def kill(*_: Any) -> None:
            os.kill(model.cluster.pids["b"], signal.SIGKILL)
            while "b" in model.cluster.pids:
                time.sleep(0.01)

        with model.model.layers[0].register_forward_hook(kill), pytest.raises(ll.WorkerDiedError):
            model(IDS)
        with model.model.layers[0].register_forward_hook(kill), pytest.raises(ll.WorkerDiedError):
            model(IDS)
        assert num_threads_of_workers(model) == before[:1]


@torch.no_grad()
def test_hooks_stay_when_layers_move_between_steps(place: Callable[..., Any], tiny_llama: str, unsharded: Any) -> None:
    moved = place(tiny_llama, [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])

    def run(model: Any) -> list[Tensor]:
        ids, cache, logits = IDS[1:], None, []
        with model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, output: output * 1.5):
            for step in range(4):
                output = model(ids, past_key_values=cache)
                ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
                logits.append(output.logits)
                if model is moved and step in (0, 2):
                    spans = [("a", 0, 3), ("b", 3, 4)] if step == 0 else [("c", 0, 2), ("a", 2, 4)]
                    moved.rebalance(plan=ll.Plan.from_spans(spans))
        return logits

    BothModels(moved, unsharded).run(run)


def test_layers_do_not_move_inside_a_hook(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    other = ll.Plan.from_spans([("c", 0, 4)])
    refused = []

    def move(*_: object) -> None:
        with pytest.raises(ll.UnsupportedOperationError, match="inside a hook"):
            model.rebalance(other)
        refused.append(True)

    with model.model.layers[1].register_forward_hook(move):
        model(IDS)
    assert refused
    model.rebalance(other)
    assert model.plan.stages[0].end == 4


@torch.no_grad()
def test_the_death_of_an_earlier_worker_leaves_nothing_in_a_later_one(tiny_llama: str) -> None:
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, devices=devices, plan=plan, progress=False) as model:
        with model.model.layers[3].register_forward_hook(lambda *_: None):
            model(IDS)
        later = Path(f"/proc/{model.cluster.pids['b']}/task")
        before = len(list(later.iterdir()))

        def kill(*_: Any) -> None:
            os.kill(model.cluster.pids["a"], signal.SIGKILL)
            wait_until(lambda: "a" not in model.cluster.pids)

        with (
            ThreadPoolExecutor(1) as pool,
            model.model.layers[3].register_forward_hook(kill),
            pytest.raises(ll.WorkerDiedError, match="'a' died"),
        ):
            pool.submit(model, IDS).result()
        wait_until(lambda: len(list(later.iterdir())) == before)


def test_a_hook_that_waits_for_layers_to_move_is_late(tiny_llama: str) -> None:
    """The move waits for the step, and the step for the move, until the hook's time is up; then both go on."""
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    plans = [ll.Plan.from_spans([("a", 0, cut), ("b", cut, 4)]) for cut in (2, 3)]
    with (
        ll.ShardedModel.from_pretrained(tiny_llama, devices=devices, plan=plans[0], progress=False) as model,
        ThreadPoolExecutor(1) as pool,
    ):
        cache = model(IDS).past_key_values
        cache.session._timeout_s = 0.5
        decisions = []

        def move(*_: Any) -> None:
            decisions.append(pool.submit(model.rebalance, plans[1]).result(60))

        with model.model.layers[1].register_forward_hook(move), pytest.raises(ll.StepTimeoutError, match="hooks of"):
            model(IDS[:, :1], past_key_values=cache)
        assert len(decisions) == 1
        assert model.plan.spans == plans[1].spans


@torch.no_grad()
def test_the_kv_of_a_step_in_progress_is_neither_read_nor_changed_by_its_hooks(llama: BothModels) -> None:
    model = llama.sharded
    cache = model(IDS).past_key_values
    uses: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (cache.get_seq_length, ll.UnsupportedOperationError, "inside a hook"),
        (lambda: cache.crop(-1), ll.UnsupportedOperationError, "inside a hook"),
        (lambda: cache.reorder_cache(torch.tensor([0, 0])), ll.UnsupportedOperationError, "inside a hook"),
        (cache.reset, ll.UnsupportedOperationError, "inside a hook"),
        (lambda: copy.deepcopy(cache), ll.ArgumentError, "in use"),
        (lambda: model(IDS[:, :1], past_key_values=cache), ll.UnsupportedOperationError, "inside a hook"),
    ]

    def use(*_: Any) -> None:
        for call, error, words in uses:
            with pytest.raises(error, match=words):
                call()

    with model.model.layers[1].register_forward_hook(use):
        logits = model(IDS[:, :1], past_key_values=cache).logits
    whole = llama.uncut(IDS).past_key_values
    assert torch.equal(logits, llama.uncut(IDS[:, :1], past_key_values=whole).logits)

    with (
        model.model.layers[1].register_forward_hook(lambda *_: cache.end()),
        pytest.raises(ll.ClosedError, match="ended during a step"),
    ):
        model(IDS[:, :1], past_key_values=cache)


@torch.no_grad()
def test_hooks_that_close_the_model_or_lose_their_own(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    layers = model.model.layers

    def from_another_thread(work: Callable[[], Any]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    # 1) hooks registered and removed by another thread while one runs
    called: list[str] = []
    handles = [layers[3].register_forward_hook(lambda *_: called.append("removed"))]

    def change(*_: Any) -> None:
        from_another_thread(handles[0].remove)
        from_another_thread(
            lambda: handles.append(layers[2].mlp.register_forward_hook(lambda *_: called.append("registered")))
        )

    with layers[1].register_forward_hook(change):
        model(IDS)
    handles[1].remove()
    assert called == ["registered"]
    # 2) a model that is closed under its hook
    with layers[2].register_forward_hook(lambda *_: from_another_thread(model.close)), pytest.raises(ll.ClosedError):
        model(IDS)

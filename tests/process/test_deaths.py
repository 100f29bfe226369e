"""Workers die, stop and freeze: who needs them is told at once, and nobody else notices."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

import lingualinked as ll
from lingualinked.cluster.pipeline import Pipeline
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.describing import describe
from processes import are_gone, family, fork_server, stopped
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow]

IDS = torch.tensor([[1, 17, 93, 54, 8]])
WITHIN_S = 5.0  # of a death, whoever waits for it has to know; a bound, not a measurement


@pytest.fixture(scope="module")
def mortal(nothing_outlives_the_session: None) -> Iterator[ll.Cluster]:
    """Workers that tests may harm: each test has its own, named after what happens to them."""
    names = [
        f"{fate}-{index}"
        for fate in ("killed", "parted", "idle", "loading", "aborted", "frozen", "well")
        for index in (1, 2)
    ]
    with ll.Cluster([ll.Device(name=name, threads=1) for name in names]) as cluster:
        cluster.workers()  # their answers say that all connections stand
        yield cluster


@pytest.fixture
def place(mortal: ll.Cluster, tiny_llama: str) -> Iterator[Callable[..., Any]]:
    models: list[ll.ShardedModel] = []

    def place_model(fate: str, **arguments: Any) -> ll.ShardedModel:
        plan = ll.Plan.from_spans([(f"{fate}-1", 0, 2), (f"{fate}-2", 2, 4)])
        models.append(
            ll.ShardedModel.from_pretrained(tiny_llama, cluster=mortal, plan=plan, progress=False, **arguments)
        )
        return models[-1]

    yield place_model
    for model in models:
        model.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def greedy(model: Any, num_tokens: int = 12) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)


def num_pending(cluster: ll.Cluster) -> int:
    return len(cluster._engine._exchange._pending._pending)


def dies(future: Future[Any], device: str) -> ll.WorkerDiedError:
    """Wait for a call to fail by a worker's death."""
    with pytest.raises(ll.WorkerDiedError, match=f"worker on device '{device}' died") as caught:
        future.result(WITHIN_S)
    assert caught.value.device == device
    return caught.value


def test_a_worker_killed_in_the_middle_of_a_step(
    mortal: ll.Cluster, place: Callable[..., Any], pool: ThreadPoolExecutor, unsharded: PreTrainedModel
) -> None:
    model, other = place("killed"), place("well")
    kept = other(IDS).past_key_values
    past = model(IDS).past_key_values
    stopped(mortal.pids["killed-2"])  # so that the steps do not end before the kill
    running = [pool.submit(greedy, model), pool.submit(lambda: model(IDS)), pool.submit(greedy, model)]
    wait_until(lambda: num_pending(mortal) == 3)
    os.kill(mortal.pids["killed-2"], signal.SIGKILL)
    for future in running:
        assert "killed by signal 9" in dies(future, "killed-2").how
    # What is asked of the model later fails likewise, and at once.
    dies(pool.submit(greedy, model), "killed-2")
    dies(pool.submit(lambda: model(IDS)), "killed-2")
    dies(pool.submit(lambda: model(IDS[:, :1], past_key_values=past)), "killed-2")
    dies(pool.submit(lambda: model.telemetry), "killed-2")
    dies(pool.submit(place, "killed"), "killed-2")
    # Nobody else notices.
    assert torch.equal(greedy(other), greedy(unsharded))
    assert other(IDS[:, :1], past_key_values=kept).logits.shape == (1, 1, 128)
    with place("well") as another:
        assert torch.equal(greedy(another), greedy(unsharded))
    assert "killed-1" in mortal.pids
    assert "killed-2" not in mortal.pids


def num_parts(cluster: ll.Cluster) -> list[int]:
    """Stages that have sent what they recorded, in each step that waits."""
    return [len(each.parts) for each in cluster._engine._exchange._pending._pending.values()]


def test_a_worker_killed_between_two_parts_of_what_is_recorded(
    mortal: ll.Cluster, place: Callable[..., Any], pool: ThreadPoolExecutor
) -> None:
    """What the first stage recorded is there, and the second one's never comes."""
    model = place("parted")
    pid = mortal.pids["parted-2"]
    stopped(pid)
    forward = pool.submit(lambda: model(IDS, output_hidden_states=True))
    generating = pool.submit(
        lambda: model.generate(IDS, output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=3)
    )
    wait_until(lambda: num_parts(mortal) == [1, 1])
    os.kill(pid, signal.SIGKILL)
    for future in (forward, generating):
        dies(future, "parted-2")
    assert num_pending(mortal) == 0


def test_an_interrupt_while_parts_are_awaited(mortal: ll.Cluster, place: Callable[..., Any]) -> None:
    """Ctrl-C ends the wait and the session; what comes later is nobody's, and the model goes on."""
    model = place("frozen")
    expected = model(IDS, output_hidden_states=True)
    pid = mortal.pids["frozen-2"]
    stopped(pid)

    def interrupt() -> None:
        wait_until(lambda: num_parts(mortal) == [1])
        os.kill(os.getpid(), signal.SIGINT)

    past = expected.past_key_values
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        model(IDS[:, :1], past_key_values=past, output_hidden_states=True)
    interrupting.join()
    with pytest.raises(ll.ClosedError, match="ended with KeyboardInterrupt"):
        model(IDS[:, :1], past_key_values=past, output_hidden_states=True)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: num_sessions(model) == [0, 0])
    wait_until(lambda: num_pending(mortal) == 0)
    found = model(IDS, output_hidden_states=True)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))


def test_a_worker_killed_while_idle(mortal: ll.Cluster, place: Callable[..., Any], pool: ThreadPoolExecutor) -> None:
    model = place("idle")
    worker = psutil.Process(mortal.pids["idle-1"])
    worker.kill()
    wait_until(lambda: "idle-1" not in mortal.pids)
    dies(pool.submit(greedy, model), "idle-1")
    assert are_gone([worker])
    with pytest.raises(ll.WorkerDiedError):
        mortal.wait()  # it was ready, and is no more


def test_a_worker_killed_while_it_loads(
    mortal: ll.Cluster, place: Callable[..., Any], pool: ThreadPoolExecutor
) -> None:
    stopped(mortal.pids["loading-1"])
    loading = pool.submit(place, "loading")
    wait_until(lambda: num_pending(mortal) == 1)
    os.kill(mortal.pids["loading-1"], signal.SIGKILL)
    dies(loading, "loading-1")


def test_an_error_while_loading_does_not_wait_for_the_other_stages(mortal: ll.Cluster, tiny_llama: str) -> None:
    plan = ll.Plan.from_spans([("loading-2", 0, 2), ("well-1", 2, 4)])
    described = describe(LoadArguments(path=tiny_llama))
    missing = dataclasses.replace(described.spec.files[0], path="/no/such/model.safetensors")
    gone = dataclasses.replace(described.spec, files=(missing,))
    pipeline = Pipeline(mortal, gone, plan, max_kv_tokens=None, timeout_s=60)
    stopped(mortal.pids["loading-2"])  # does not answer, for now
    with pytest.raises(ll.CheckpointError, match=r"device 'well-1': .*/no/such/model\.safetensors"):
        pipeline.load(lambda device, num_bytes: None)
    pipeline.unload()
    wait_until(lambda: num_pending(mortal) == 0)
    os.kill(mortal.pids["loading-2"], signal.SIGCONT)


def test_the_last_words_of_a_crash_come_along(
    mortal: ll.Cluster, place: Callable[..., Any], pool: ThreadPoolExecutor
) -> None:
    model = place("aborted")
    os.kill(mortal.pids["aborted-1"], signal.SIGABRT)
    wait_until(lambda: "aborted-1" not in mortal.pids)
    how = dies(pool.submit(greedy, model), "aborted-1").how
    assert "killed by signal 6" in how
    assert "Fatal Python error: Aborted" in how


def test_a_worker_that_does_not_answer(
    mortal: ll.Cluster, place: Callable[..., Any], unsharded: PreTrainedModel
) -> None:
    model = place("frozen")
    past = model(IDS).past_key_values
    pid = mortal.pids["frozen-2"]
    stopped(pid)
    patience_s, model._pipeline.timeout_s, past.session._timeout_s = model._pipeline.timeout_s, 0.5, 0.5
    for use in (
        lambda: model(IDS[:, :1], past_key_values=past),
        lambda: greedy(model),
        lambda: model(IDS, output_hidden_states=True),
        lambda: model.telemetry,
    ):
        with pytest.raises(ll.StepTimeoutError, match=r"frozen-2.*within timeout_s=0\.5"):
            use()
    model._pipeline.timeout_s = patience_s
    os.kill(pid, signal.SIGCONT)
    # It was only late: what it says of the steps that were given up is nobody's any more, and the model goes on.
    wait_until(lambda: num_sessions(model) == [0, 0])
    assert torch.equal(greedy(model), greedy(unsharded))
    with pytest.raises(ll.ClosedError, match="ended with StepTimeoutError"):
        model(IDS[:, :1], past_key_values=past)


def test_a_fork_server_killed_and_workers_after_it(
    own_fork_server: None, tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    """Running workers go on, one that dies is noticed all the same, and a stopped one ends with the cluster."""
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "abc"]) as cluster:
        processes = family(cluster)
        server = fork_server(cluster)
        plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
        model: Any = ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False)
        server.kill()
        wait_until(lambda: are_gone([server]))
        assert torch.equal(greedy(model), greedy(unsharded))
        assert set(cluster.pids) == {"a", "b", "c"}
        os.kill(cluster.pids["b"], signal.SIGKILL)
        with ThreadPoolExecutor(1) as pool:
            wait_until(lambda: "b" not in cluster.pids)
            dies(pool.submit(greedy, model), "b")
        stopped(cluster.pids["c"])
    assert are_gone(processes)


def test_closing_the_cluster_of_a_running_generate(tiny_llama: str) -> None:
    """`close` from another thread ends it, and its workers, with an error that says so."""
    model: Any = ll.ShardedModel.from_pretrained(tiny_llama, devices=2, plan="even", progress=False)
    processes, running = family(model.cluster), threading.Event()

    def started(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        running.set()
        return torch.zeros(len(ids), dtype=torch.bool)

    def generate() -> None:
        model.generate(IDS, max_new_tokens=10**6, do_sample=False, eos_token_id=None, stopping_criteria=[started])

    with ThreadPoolExecutor(3) as pool:
        generating = pool.submit(generate)
        assert running.wait(30)
        stopped(model.cluster.pids["worker-1"])  # so that closing takes its time
        for closing in reversed([pool.submit(model.close), pool.submit(model.close)]):
            closing.result(30)
            assert are_gone(processes)  # whichever of the two has done it
        with pytest.raises(ll.ClosedError):
            generating.result(30)
    assert model.cluster.closed

"""A running cluster takes in a new device: what runs goes on, what comes later may use it, what fails leaves no trace."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import psutil
import pytest
import torch
from transformers import PreTrainedModel

import lingualinked as ll
from lingualinked.cluster.workers.cluster_workers import ClusterWorkers
from lingualinked.processes.forked_workers import ForkedWorkers
from lingualinked.protocol.boot import Boot
from lingualinked.protocol.measuring import ProbeLink
from processes import are_gone, family, fork_server, stopped
from waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow]

IDS = torch.tensor([[1, 17, 93, 54, 8]])
OLD = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
LATE = ll.Device(name="late", threads=1)


@pytest.fixture
def cluster() -> Iterator[ll.Cluster]:
    """Two workers; not the shared ones, since what is added stays."""
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "ab"]) as made:
        made.wait()
        yield made


def greedy(model: Any, num_tokens: int = 12) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)


def load(cluster: ll.Cluster, path: str, plan: ll.Plan) -> Any:
    return ll.ShardedModel.from_pretrained(path, cluster=cluster, plan=plan, progress=False)


def state(cluster: ll.Cluster) -> tuple[Any, ...]:
    """Everything that a failed addition must leave as it was."""
    settled = sorted(cluster._engine._exchange.settled)
    return (
        cluster.devices,
        cluster.links,
        dict(cluster._behaving),
        cluster.pids,
        cluster._workers.launcher.pids(),
        settled,
    )


def works(cluster: ll.Cluster, path: str, unsharded: PreTrainedModel, plan: ll.Plan) -> None:
    with load(cluster, path, plan) as model:
        assert torch.equal(greedy(model), greedy(unsharded))


def test_a_device_is_added_while_a_model_generates(
    cluster: ll.Cluster, tiny_llama: str, unsharded: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    expected, enough = greedy(unsharded, 40), threading.Event()
    with load(cluster, tiny_llama, OLD) as model, ThreadPoolExecutor(1) as pool:
        running = threading.Event()

        def keep_generating() -> int:
            num_right = 0
            while not enough.is_set():
                assert torch.equal(greedy(model, 40), expected)
                num_right += 1
                running.set()
            return num_right

        generating = pool.submit(keep_generating)
        try:
            assert running.wait(60)
            before = cluster.pids
            cluster.add(LATE)
            assert [device.name for device in cluster.devices] == ["a", "b", "late"]
            assert cluster.pids == {**before, "late": cluster.pids["late"]}
            assert [worker.device for worker in cluster.workers()] == ["a", "b", "late"]
            assert "a, b, late: 3 workers" in repr(cluster)
            for spans in ([("b", 0, 1), ("late", 1, 3), ("a", 3, 4)], [("late", 0, 4)], [("late", 0, 2), ("b", 2, 4)]):
                works(cluster, tiny_llama, unsharded, ll.Plan.from_spans(spans))
            model.rebalance(ll.Plan.from_spans([("a", 0, 1), ("late", 1, 4)]))  # under load, KV and all
        finally:
            enough.set()
        assert generating.result(60) > 0
    assert "refused" not in caplog.text


def test_what_was_given_for_it_is_what_it_gets(cluster: ll.Cluster) -> None:
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    cpus = (core,) if hasattr(os, "sched_getaffinity") else None
    slow = ll.Link(latency="30ms", bandwidth="1MB/s")
    device = ll.Device(name="late", cpus=cpus, slowdown=2.0, latency="1ms", memory="64MiB")
    cluster.add(device, links={("a", "late"): slow})
    added = cluster.device("late")
    assert (added.threads, added.slowdown) == (1, 2.0)
    assert cluster.links == {("a", "late"): slow}
    if cpus is not None:
        assert os.sched_getaffinity(cluster.pids["late"]) == {core}
    cluster.throttle("late", slowdown=3.0)
    cluster.throttle("a", latency="2ms")


def test_links_to_and_from_it_are_emulated(cluster: ll.Cluster) -> None:
    cluster.throttle("b", latency="10ms")  # while it runs: so it is for who comes later, too
    cluster.add(ll.Device(name="late", threads=1, latency="15ms"), links={("a", "late"): ll.Link(latency="60ms")})
    engine = cluster._engine

    def round_trip_s(source: str, target: str) -> float:
        answer: Any = engine.request(
            source,
            ProbeLink(request=engine.next_request(), target=target, sizes=(8, 8, 8)),
            "a probe",
            30,
        ).result(30)
        return min(answer.seconds)

    # Never less, however fast the machine: there and back.
    assert round_trip_s("a", "late") >= 0.060 + 0.015
    assert round_trip_s("late", "b") >= 2 * (0.010 + 0.015)
    assert round_trip_s("late", "caller") >= 2 * 0.015


def test_threads_are_its_share_of_the_cores(cluster: ll.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.cluster.workers.devices.usable_cores", lambda: 7)
    cluster.add(ll.Device(name="late"))
    assert cluster.device("late").threads == 2


def test_several_threads_may_add_at_once(cluster: ll.Cluster, tiny_llama: str, unsharded: PreTrainedModel) -> None:
    devices = [ll.Device(name=f"late-{index}", threads=1) for index in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(cluster.add, devices))
    names = [device.name for device in cluster.devices]
    assert names[:2] == ["a", "b"]
    assert sorted(names[2:]) == ["late-0", "late-1", "late-2"]
    plan = ll.Plan.from_spans([("late-2", 0, 1), ("late-0", 1, 2), ("late-1", 2, 3), ("a", 3, 4)])
    works(cluster, tiny_llama, unsharded, plan)


def test_a_name_added_twice_at_once_is_added_once(cluster: ll.Cluster) -> None:
    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception() for future in [pool.submit(cluster.add, LATE) for _ in range(2)]]
    assert sorted(type(error).__name__ for error in errors) == ["ArgumentError", "NoneType"]
    assert len(cluster.pids) == 3


def test_a_cluster_that_still_starts_takes_one_in(tiny_llama: str, unsharded: PreTrainedModel) -> None:
    with ll.Cluster([ll.Device(name="a", threads=1)]) as cluster:
        cluster.add(LATE)
        works(cluster, tiny_llama, unsharded, ll.Plan.from_spans([("late", 0, 2), ("a", 2, 4)]))


def test_a_worker_that_has_died_is_no_obstacle(
    cluster: ll.Cluster, tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    os.kill(cluster.pids["a"], signal.SIGKILL)
    cluster.add(LATE)
    assert set(cluster.pids) == {"b", "late"}
    works(cluster, tiny_llama, unsharded, ll.Plan.from_spans([("late", 0, 2), ("b", 2, 4)]))


# --- what fails


def test_a_worker_that_can_not_start_leaves_the_cluster_as_it_was(
    cluster: ll.Cluster, tiny_llama: str, unsharded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(cluster)

    def spoil(workers: ClusterWorkers, record: Boot) -> None:
        add(workers, msgspec.structs.replace(record, caller_key="~" * 40))

    add = ClusterWorkers.add

    with load(cluster, tiny_llama, OLD) as model:
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(ClusterWorkers, "add", spoil)
                with pytest.raises(ll.WorkerDiedError, match=r"'late' died \(exit status 1.*last words") as caught:
                    cluster.add(LATE, links={("late", "a"): ll.Link(latency="1ms")})
            assert caught.value.device == "late"
            assert state(cluster) == before
            assert torch.equal(greedy(model), greedy(unsharded))
        cluster.throttle("a", slowdown=1.0)  # nobody else is told
        cluster.add(LATE)
        works(cluster, tiny_llama, unsharded, ll.Plan.from_spans([("late", 0, 2), ("a", 2, 4)]))


@pytest.mark.parametrize("forks", [True, False])
def test_a_worker_that_is_not_ready_in_time_is_ended(
    forks: bool, own_fork_server: None, tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    if forks and not hasattr(os, "pidfd_open"):
        pytest.skip("nothing is forked here")
    with ll.Cluster([ll.Device(name="a", threads=1)], _forks=forks) as cluster:
        cluster.wait()
        before, processes = state(cluster), family(cluster)
        cluster.timeout_s = 0.2
        if forks:
            server = fork_server(cluster)
            stopped(server.pid)
        for _ in range(2):  # a plain start imports for seconds
            with pytest.raises(ll.StepTimeoutError, match="worker on device 'late' was not ready within"):
                cluster.add(LATE)
            assert [device.name for device in cluster.devices] == ["a"]
        if forks:
            server.resume()  # now it forks those that nobody waits for any more
        cluster.timeout_s = 60.0
        wait_until(lambda: len(cluster._workers.launcher._processes) == 1)
        assert state(cluster) == before
        assert family(cluster) == processes
        cluster.add(LATE)
        works(cluster, tiny_llama, unsharded, ll.Plan.from_spans([("late", 0, 2), ("a", 2, 4)]))
        cluster.timeout_s = 60.0
        processes = family(cluster)
    assert are_gone(processes)


def test_a_plain_worker_that_is_killed_while_it_starts(tiny_llama: str, unsharded: PreTrainedModel) -> None:
    with ll.Cluster([ll.Device(name="a", threads=1)], _forks=False) as cluster, ThreadPoolExecutor(1) as pool:
        cluster.wait()
        before = state(cluster)
        adding = pool.submit(cluster.add, LATE)
        wait_until(lambda: "late" in cluster._workers.launcher.pids())
        assert "late" not in cluster.pids  # it is none of the cluster's yet
        os.kill(cluster._workers.launcher.pids()["late"], signal.SIGKILL)
        with pytest.raises(ll.WorkerDiedError, match=r"'late' died \(killed by signal 9"):
            adding.result(60)
        assert state(cluster) == before
        assert len(cluster._workers.launcher._processes) == 1


def test_a_cluster_whose_fork_server_has_died_says_so(own_fork_server: None, cluster: ll.Cluster) -> None:
    before = state(cluster)
    if not isinstance(cluster._workers.launcher._starter, ForkedWorkers):
        pytest.skip("nothing is forked here")
    fork_server(cluster).kill()
    for _ in range(2):
        words = r"'late' died \(it was not started: the process that forks .* had ended, killed by signal 9"
        with pytest.raises(ll.WorkerDiedError, match=words):
            cluster.add(LATE)
        assert state(cluster) == before
    with ll.Cluster(1) as other:  # which has a fork server that lives
        other.wait()


def test_a_worker_that_does_not_answer_stops_the_addition(cluster: ll.Cluster) -> None:
    before, cluster.timeout_s = state(cluster), 0.2
    pid = cluster.pids["b"]
    stopped(pid)
    with pytest.raises(ll.StepTimeoutError, match="the announcement of a new device on device 'b' got no answer"):
        cluster.add(LATE)
    os.kill(pid, signal.SIGCONT)
    cluster.timeout_s = 60.0
    assert state(cluster) == before
    cluster.add(LATE)


def test_closing_while_a_device_is_added_ends_both(own_fork_server: None) -> None:
    with ll.Cluster([ll.Device(name="a", threads=1)]) as cluster, ThreadPoolExecutor(2) as pool:
        cluster.wait()
        server = fork_server(cluster)
        processes = [server, psutil.Process(cluster.pids["a"])]
        stopped(server.pid)  # so that both additions wait, one for its worker, one for the other
        adding = [pool.submit(cluster.add, ll.Device(name=name, threads=1)) for name in ("late", "later")]
        wait_until(lambda: len(cluster._workers.launcher._processes) == 2)
        cluster.close()
        for future in adding:
            with pytest.raises(ll.ClosedError):
                future.result(60)
        assert are_gone(processes)
        assert [device.name for device in cluster.devices] == ["a"]
        with pytest.raises(ll.ClosedError):
            cluster.add(LATE)


@pytest.mark.parametrize(
    ("device", "links", "words"),
    [
        ("late", None, "device='late' is not a lingualinked.Device"),
        (1, None, "device=1 is not a lingualinked.Device"),
        (ll.Device(name="b"), None, r"named 'b' is in this cluster already \(\['a', 'b', 'c', 'd'\]\): choose another"),
        (ll.Device(name="late", cpus=(10**6,)), None, r"cores \[1000000\] are not among"),
        (LATE, {("late", "moon"): ll.Link()}, "there is no device 'moon'"),
        (LATE, {("a", "b"): ll.Link()}, r"\('a', 'b'\), which is not a link of device 'late'"),
        (LATE, {("late", "late"): ll.Link()}, "two different devices"),
        (LATE, {("late", "a"): 3}, "give \\(source, target\\) names"),
        (LATE, 3, "links is a int"),
    ],
)
def test_what_can_not_be_added(shared_cluster: ll.Cluster, device: Any, links: Any, words: str) -> None:
    before = state(shared_cluster)
    with pytest.raises(ll.ArgumentError, match=words):
        shared_cluster.add(device, links=links)
    assert state(shared_cluster) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_not_add(cluster: ll.Cluster) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            cluster.add(LATE)
        except ll.UnsupportedOperationError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(cluster.pids) == 2

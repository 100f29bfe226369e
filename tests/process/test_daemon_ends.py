"""However a caller, a worker or a daemon ends: what belongs to it goes, is named, and nobody else is disturbed."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch

import lingualinked as ll
from daemons import DaemonProcess, Daemons, running_daemons
from processes import Script, are_gone, stopped
from waiting import wait_until

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])


@pytest.fixture(scope="module")
def daemons(shared_fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with running_daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        yield daemons


@pytest.fixture(scope="module")
def daemon(daemons: Daemons) -> DaemonProcess:
    daemon = daemons.start("--memory", "1GiB")
    with ll.Cluster([daemon.device("a")]) as cluster:
        cluster.wait()
    return daemon


def load(cluster: ll.Cluster, path: str, *names: str) -> ll.ShardedModel:
    step = 4 // len(names)
    plan = ll.Plan.from_spans([(name, step * index, step * (index + 1)) for index, name in enumerate(names)])
    return ll.ShardedModel.from_pretrained(path, cluster=cluster, plan=plan, progress=False)


def greedy(model: Any, num_tokens: int = 8) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return]


def repeat(call: Callable[[], object]) -> NoReturn:
    while True:
        call()


def test_a_dropped_cluster_and_an_interrupted_start_leave_no_worker(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ll.Cluster([daemon.device("a")])
    cluster.wait()
    assert len(daemon.workers()) == 1
    del cluster
    gc.collect()
    daemon.wait_until_idle()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lingualinked.cluster.cluster._start_engine", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ll.Cluster([daemon.device("a")])
    daemon.wait_until_idle()
    with ll.Cluster([daemon.device("a")]) as cluster:  # its memory is free again
        assert cluster.device("a").memory_bytes == 1 << 30


def test_a_cluster_that_could_not_be_used_ends_with_its_last_reference(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingualinked.transport.sockets.awaited_connections.CONNECT_S", 0.5)

    def fail() -> None:
        ll.Cluster([daemon.device("a", advertise="192.0.2.1")]).wait()

    with pytest.raises(ll.UnreachableError, match=r"the caller can't connect to device 'a' at tcp://192.0.2.1:"):
        fail()
    gc.collect()
    daemon.wait_until_idle()


def test_fifty_clusters_one_after_the_other_leave_nothing(daemon: DaemonProcess) -> None:
    def held() -> tuple[int, int, int]:
        process = psutil.Process(daemon.process.pid)
        (fork_server,) = process.children()
        return process.num_threads(), fork_server.num_fds(), len(fork_server.children())

    before = held()
    descriptors = psutil.Process(daemon.process.pid).num_fds()
    for _ in range(50):
        with ll.Cluster([daemon.device("a")]) as cluster:
            cluster.wait()
    wait_until(lambda: held() == before)
    # libzmq closes a connection a little later than its peer; two are those under way.
    wait_until(lambda: psutil.Process(daemon.process.pid).num_fds() <= descriptors + 2)


CALLER = """
import ctypes, json, os, sys, threading
import lingualinked as ll

def say(what):
    print(json.dumps(what), flush=True)

address, server_key = sys.stdin.readline().split()
cluster = ll.Cluster([ll.Device(name="b", address=address, server_key=server_key, memory="128MiB")])
cluster.wait()
child = os.fork()
if child == 0:
    try:
        cluster.workers()
    except ll.UnsupportedOperationError:
        pass
    else:
        os._exit(1)
    cluster.close()
    threading.Event().wait()
# One that runs no hook of Python's, and keeps a copy of every descriptor.
without_hooks = ctypes.PyDLL(None).fork()
if without_hooks == 0:
    ctypes.PyDLL(None).pause()
cluster.workers()
say([list(cluster.pids.values()), [child, without_hooks]])
threading.Event().wait()
"""


def test_a_caller_is_killed_and_another_goes_on(
    daemon: DaemonProcess, tiny_llama: str, unsharded: Any, tmp_path: Path
) -> None:
    """Its children hold copies of its connections, and its worker is stopped, so that nothing but the lease ends them."""
    expected = greedy(unsharded, 200)
    with (
        ll.Cluster([daemon.device("a", memory="128MiB"), ll.Device(name="here", threads=1)]) as cluster,
        load(cluster, tiny_llama, "a", "here") as model,
        Script(CALLER, tmp_path) as script,
    ):
        script.process.stdin.write(f"{daemon.address} {daemon.server_key}\n".encode())  # type: ignore[union-attr]
        workers, children = ([psutil.Process(pid) for pid in each] for each in script.hear())
        try:
            assert len(daemon.workers()) == 2
            stopped(workers[0].pid)
            came: list[torch.Tensor] = []
            thread = threading.Thread(target=lambda: came.append(greedy(model, 200)))
            thread.start()
            script.process.kill()
            wait_until(lambda: are_gone(workers))
            thread.join()
            assert torch.equal(came[0], expected)
            assert not any(are_gone([child]) for child in children)
            daemon.wait_for_log("can't be reached any more")
        finally:
            for process in (*children, *workers):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        assert torch.equal(greedy(model, 200), expected)
        assert len(daemon.workers()) == 1
    daemon.wait_until_idle()


def test_a_stopped_caller_loses_its_worker(daemon: DaemonProcess, tmp_path: Path) -> None:
    with Script(CALLER, tmp_path) as script:
        script.process.stdin.write(f"{daemon.address} {daemon.server_key}\n".encode())  # type: ignore[union-attr]
        (worker,), children = script.hear()
        try:
            stopped(script.process.pid)
            wait_until(lambda: are_gone([psutil.Process(worker)]) if psutil.pid_exists(worker) else True)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
    daemon.wait_until_idle()


def test_a_worker_is_killed(daemon: DaemonProcess, tiny_llama: str, unsharded: Any) -> None:
    with ll.Cluster([daemon.device("a")]) as cluster, load(cluster, tiny_llama, "a") as model:
        os.kill(cluster.pids["a"], signal.SIGKILL)
        with pytest.raises(ll.WorkerDiedError, match=r"'a' died .*killed by signal 9") as caught:
            repeat(lambda: greedy(model))
        assert caught.value.device == "a"
        assert cluster.pids == {}
        with ll.Cluster([daemon.device("a")]) as other, load(other, tiny_llama, "a") as again:  # all memory is free
            assert torch.equal(greedy(again), greedy(unsharded))


def test_a_daemon_is_killed(daemon: DaemonProcess, daemons: Daemons, tiny_llama: str) -> None:
    with (
        daemons.start() as mortal,
        ll.Cluster([daemon.device("a"), mortal.device("b")]) as cluster,
        load(cluster, tiny_llama, "a", "b") as model,
    ):
        processes = psutil.Process(mortal.process.pid).children(recursive=True)
        assert len(processes) == 2
        mortal.process.kill()
        with pytest.raises(ll.WorkerDiedError, match=f"'b' died .*its daemon at {mortal.address} has ended") as caught:
            repeat(lambda: greedy(model))
        assert caught.value.device == "b"
        wait_until(lambda: are_gone(processes))
        assert set(cluster.pids) == {"a"}
    daemon.wait_until_idle()


def test_a_daemon_is_silent(daemons: Daemons) -> None:
    """As when a network is cut: both sides give up, and nothing is taken up again when it is back."""
    with daemons.start() as silent, ll.Cluster([silent.device("b")]) as cluster:
        wait_until(lambda: len(silent.workers()) == 1, 60)
        stopped(silent.process.pid)
        with pytest.raises(ll.WorkerDiedError, match=r"'b' died \(nothing was heard for .* the network is cut"):
            repeat(cluster.wait)
        silent.process.send_signal(signal.SIGCONT)
        silent.wait_until_idle()
        with ll.Cluster([silent.device("b")]) as again:
            assert again.device("b").threads == 1
        cluster.add(silent.device("later"))  # what has ended leaves its address to another device
        assert set(cluster.pids) == {"later"}


def test_a_daemon_is_told_to_end(daemons: Daemons) -> None:
    with daemons.start() as mortal, ll.Cluster([mortal.device("b")]) as cluster:
        processes = psutil.Process(mortal.process.pid).children(recursive=True)
        mortal.process.terminate()
        with pytest.raises(ll.WorkerDiedError, match=r"'b' died .*its daemon at .* has ended"):
            cluster.wait()
        assert mortal.process.wait(30) == 128 + signal.SIGTERM
        assert are_gone(processes)


def test_layers_have_nowhere_to_go(daemons: Daemons, tiny_llama: str) -> None:
    with (
        daemons.start() as mortal,
        ll.Cluster([mortal.device("b")]) as cluster,
        load(cluster, tiny_llama, "b") as model,
    ):
        mortal.end()
        with pytest.raises(ll.WorkerDiedError, match=r"'b' died .*its daemon at .* has ended"):
            repeat(cluster.wait)
        with pytest.raises(ll.WorkerDiedError, match="'b' died"):
            model.rebalance()  # no device is left to be measured


def test_a_client_is_revoked(daemons: Daemons, tmp_path: Path) -> None:
    clients = tmp_path / "config" / "lingualinked" / "authorized_clients"
    clients.parent.mkdir(mode=0o700, parents=True)
    clients.write_text(f"{daemons.keys.public} me\n")
    with DaemonProcess(tmp_path, "").wait_until_it_listens() as daemon, ll.Cluster([daemon.device("a")]) as cluster:
        clients.write_text("")
        with pytest.raises(ll.WorkerDiedError, match="not authorised any more"):
            repeat(cluster.wait)
        daemon.wait_until_idle()
        with pytest.raises(ll.DaemonError, match="does not let in our key 'default'"):
            ll.Cluster([daemon.device("a")])


def test_a_daemon_that_serves_once_ends_with_its_caller(daemons: Daemons) -> None:
    with daemons.start("--once", "--wait", "60") as daemon:
        with ll.Cluster([daemon.device("a")]) as cluster:
            with pytest.raises(ll.DaemonError, match=r"started for one caller \(--once\)"):
                ll.Cluster([daemon.device("b")])
            assert not cluster.closed
        assert daemon.process.wait(30) == 0


def test_a_daemon_that_serves_once_ends_with_a_killed_caller(daemons: Daemons, tmp_path: Path) -> None:
    with daemons.start("--once") as daemon, Script(CALLER, tmp_path) as script:
        script.process.stdin.write(f"{daemon.address} {daemon.server_key}\n".encode())  # type: ignore[union-attr]
        _, children = script.hear()
        for pid in (script.process.pid, *children):
            os.kill(pid, signal.SIGKILL)
        assert daemon.process.wait(30) == 0


def test_a_daemon_ends_with_its_parent(daemons: Daemons) -> None:
    with daemons.start("--lifeline") as daemon:
        processes = psutil.Process(daemon.process.pid).children(recursive=True)
        assert daemon.process.stdin is not None
        daemon.process.stdin.close()
        assert daemon.process.wait(30) == 0
        assert are_gone(processes)

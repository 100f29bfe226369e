"""A cluster's workers are as they were asked for, serve several models, and say what they have to say."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

import lingualinked as ll
from lingualinked.cluster.pipeline import Pipeline
from lingualinked.cluster.workers.inspection import inspect_workers
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.describing import describe
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox
from processes import are_gone, family, fork_server
from waiting import num_sessions, wait_until

pytestmark = pytest.mark.process

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="what Linux alone has: /proc, RLIMIT_DATA")

IDS = torch.tensor([[1, 17, 93, 54, 8]])
MIB = 1024**2


@pytest.fixture(scope="module")
def limited(nothing_outlives_the_session: None) -> Iterator[ll.Cluster]:
    """Three workers with wishes of their own."""
    core = min(os.sched_getaffinity(0))
    devices = [
        ll.Device(name="small", threads=1, memory="64MiB"),
        ll.Device(name="pinned", cpus=(core,)),
        ll.Device(name="wide", threads=3),
    ]
    with ll.Cluster(devices) as cluster:
        cluster.workers()  # their answers say that all connections stand
        yield cluster


def greedy(model: Any, ids: torch.Tensor = IDS, num_tokens: int = 12) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)


def num_stages(cluster: ll.Cluster) -> dict[str, int]:
    names = [device.name for device in cluster.devices]
    return {each.worker.device: len(each.stages) for each in inspect_workers(cluster._engine, names, 30)}


# --- as asked for


def test_threads_and_cores_are_those_asked_for(limited: ll.Cluster) -> None:
    threads = {worker.device: worker.threads for worker in limited.workers()}
    assert threads == {"small": 1, "pinned": 1, "wide": 3}
    if hasattr(os, "sched_getaffinity"):
        assert os.sched_getaffinity(limited.pids["pinned"]) == {min(os.sched_getaffinity(0))}
        assert os.sched_getaffinity(limited.pids["small"]) == os.sched_getaffinity(0)


def test_workers_are_told_apart_and_are_not_this_process(limited: ll.Cluster) -> None:
    pids = limited.pids
    assert set(pids) == {"small", "pinned", "wide"}
    assert len({os.getpid(), *pids.values()}) == 4
    assert {worker.device: worker.pid for worker in limited.workers()} == pids


def test_an_accelerator_that_is_not_there_is_refused_before_a_process_starts(tiny_llama: str) -> None:
    devices = [ll.Device(name="here"), ll.Device(name="gpu", accelerator="cuda:77")]
    for start in (lambda: ll.Cluster(devices), lambda: ll.ShardedModel.from_pretrained(tiny_llama, devices=devices)):
        with pytest.raises(ll.ArgumentError, match=r"accelerator='cuda:77' of device 'gpu': this machine has"):
            start()


def test_an_accelerator_that_is_not_there_is_refused_by_a_running_cluster(limited: ll.Cluster) -> None:
    with pytest.raises(ll.ArgumentError, match=r"accelerator='cuda:77' of device 'gpu': this machine has"):
        limited.add(ll.Device(name="gpu", accelerator="cuda:77"))
    assert set(limited.pids) == {"small", "pinned", "wide"}


def test_keys_are_neither_in_arguments_nor_in_the_environment(limited: ll.Cluster) -> None:
    keys = limited._engine._mailbox._keys
    for process in family(limited):
        said = " ".join([*process.cmdline(), *process.environ().values()])
        assert keys.public not in said
        assert keys.secret not in said


def test_workers_are_in_a_session_of_their_own(limited: ll.Cluster) -> None:
    for process in family(limited):
        assert os.getsid(process.pid) != os.getsid(0)  # so that Ctrl-C in a terminal does not reach them


def descriptors(pid: int, kind: str) -> list[str]:
    targets = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            targets.append(str(entry.readlink()))
    return [target for target in targets if target.startswith(kind)]


@linux_only
def test_a_forked_worker_holds_nothing_of_the_others(limited: ll.Cluster) -> None:
    server = fork_server(limited)
    assert server.num_threads() == 1  # so that forking it is safe
    (channel,) = set(descriptors(server.pid, "socket:")) & set(descriptors(limited.pids["pinned"], "socket:"))
    for one, other in itertools.combinations([os.getpid(), server.pid, *limited.pids.values()], 2):
        common = set(descriptors(one, "socket:")) & set(descriptors(other, "socket:"))
        assert common == (set() if one == os.getpid() else {channel})
    for pid in (server.pid, *limited.pids.values()):
        assert len(descriptors(pid, "anon_inode:[pidfd]")) == 1  # the caller's


@linux_only
def test_what_the_caller_executes_inherits_nothing(limited: ll.Cluster) -> None:
    wait = [sys.executable, "-c", "input()"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, close_fds=False) as child:
        inherited = [*descriptors(child.pid, "socket:"), *descriptors(child.pid, "anon_inode:")]
        child.communicate(b"\n")
    assert inherited == []


# --- memory


def wide(num_layers: int, hidden_size: int = 64) -> LlamaConfig:
    """A model whose KV is far larger than its weights: 16 KiB a token and layer."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=64,
        vocab_size=64,
        dtype="float32",
    )


def test_a_plan_that_passes_a_memory_limit_is_refused_before_anything_is_read(limited: ll.Cluster) -> None:
    config = wide(1, hidden_size=4096)
    with pytest.raises(ll.InfeasiblePlanError, match=r"device 'small', which has 64\.0 MiB") as caught:
        ll.ShardedModel.from_pretrained(
            "dummy",
            config=config,
            load_format="dummy",
            cluster=limited,
            plan=ll.Plan.from_spans([("small", 0, 1)]),
            progress=False,
        )
    assert caught.value.missing_bytes > 0
    assert num_stages(limited)["small"] == 0


def test_no_layer_fits_a_device(nothing_left_behind: None) -> None:
    devices = [ll.Device(name="tiny", memory="1KiB"), ll.Device(name="b")]
    with pytest.raises(ll.InfeasiblePlanError, match=r"device 'tiny' has 1\.0 KiB.* short"):
        ll.ShardedModel.from_pretrained(
            "dummy", config=wide(2), load_format="dummy", devices=devices, plan="even", progress=False
        )


@linux_only
def test_what_probes_keep_is_not_taken_from_little_memory(
    own_fork_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine's first run nothing is on disk, and in bfloat16 torch keeps up to 200 MB of what has been tried."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import resource  # which Windows does not have

    devices = [ll.Device(name="a", threads=1, memory="6MiB")]
    with ll.ShardedModel.from_pretrained(ll.sample_model(), devices=devices, progress=False) as model:
        assert model.profile.device("a").rounding.fingerprint
        assert len(list(tmp_path.rglob("probes-*.json"))) == 1
        limit, _ = resource.prlimit(model.cluster.pids["a"], resource.RLIMIT_DATA)
        assert limit != resource.RLIM_INFINITY  # it is in force again


@linux_only
def test_the_kernel_refuses_what_the_plan_did_not_know_of(limited: ll.Cluster) -> None:
    config = wide(4, hidden_size=4096)
    described = describe(LoadArguments(path="dummy", config=config, load_format="dummy"))
    spans = ll.Plan.from_spans([("small", 0, 4)])  # of unknown size
    pipeline = Pipeline(limited, described.spec, spans, max_kv_tokens=None, timeout_s=60)
    with pytest.raises(ll.DeviceMemoryError, match="worker on device 'small'") as caught:
        pipeline.load(lambda device, num_bytes: None)
    assert caught.value.device == "small"
    assert "Remote traceback" in str(caught.value)
    pipeline.unload()
    assert num_stages(limited)["small"] == 0


@linux_only
def test_kv_that_passes_the_limit_is_refused_and_the_others_go_on(limited: ll.Cluster) -> None:
    plan = ll.Plan.from_spans([("small", 0, 2)])
    with ll.ShardedModel.from_pretrained(
        "dummy", config=wide(2), load_format="dummy", cluster=limited, plan=plan, progress=False
    ) as model:
        pid, batch = limited.pids["small"], torch.ones(16, 32, dtype=torch.long)
        held = [model(batch, logits_to_keep=1).past_key_values]
        with pytest.raises(ll.DeviceMemoryError, match="worker on device 'small'"):
            held.extend(model(batch, logits_to_keep=1).past_key_values for _ in range(50))
        wait_until(lambda: num_sessions(model) == [len(held)])
        assert model(batch[:, :1], past_key_values=held[0], logits_to_keep=1).logits.shape == (16, 1, 64)
        for past in held[1:3]:
            past.end()
        assert model(batch, logits_to_keep=1).past_key_values.get_seq_length() == 32  # there is room again
        assert limited.pids["small"] == pid


def test_max_kv_tokens_bounds_all_sessions_together(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)], max_kv_tokens=20)
    first = model(IDS).past_key_values
    second = model(IDS.repeat(2, 1)).past_key_values
    with pytest.raises(ll.KVCapacityError, match="max_kv_tokens=20"):
        model(torch.ones(1, 6, dtype=torch.long))
    with pytest.raises(ll.KVCapacityError):
        greedy(model, num_tokens=30)
    # Refused before anything was sent: both go on where they were.
    assert model(IDS[:, :1], past_key_values=first).past_key_values.get_seq_length() == 6
    assert second.get_seq_length() == 5
    del second
    model(torch.ones(1, 6, dtype=torch.long))
    wait_until(lambda: num_sessions(model) == [1, 1])


# --- several models, several clusters


def test_models_side_by_side_use_the_same_processes(
    shared_cluster: ll.Cluster, place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    shared_cluster.wait()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    models = [place(tiny_llama, [(first, 0, 2), (last, 2, 4)]) for first, last in ("ab", "ba", "ca")]
    prompts = [torch.tensor([[1, 40 + index, 60 + index]]) for index in range(9)]
    with ThreadPoolExecutor(9) as pool:  # every model has a first session, and a first step of it
        tokens = list(pool.map(greedy, models * 3, prompts))
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before
    for ids, ours in zip(prompts, tokens, strict=True):
        assert torch.equal(ours, greedy(unsharded, ids))


def test_a_model_after_another_finds_the_workers_empty(
    shared_cluster: ll.Cluster, tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    pids, before = shared_cluster.pids, num_stages(shared_cluster)
    for _ in range(2):
        with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan="even", progress=False) as model:
            assert torch.equal(greedy(model), greedy(unsharded))
            assert sum(num_stages(shared_cluster).values()) == sum(before.values()) + 4
        wait_until(lambda: num_stages(shared_cluster) == before)
    assert shared_cluster.pids == pids


def test_one_worker_may_hold_both_ends(place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel) -> None:
    for spans in ([("a", 0, 1), ("b", 1, 3), ("a", 3, 4)], [("a", 0, 2), ("a", 2, 4)], [("a", 0, 4)]):
        assert torch.equal(greedy(place(tiny_llama, spans)), greedy(unsharded))


def test_a_handle_on_kv_that_outlives_its_model_is_no_trouble(
    place: Callable[..., Any], tiny_llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    past = model(IDS).past_key_values
    model.close()
    past.end()
    place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])  # whatever the workers had to say has come before this
    assert not caplog.records


def test_two_clusters_and_plain_starts(shared_cluster: ll.Cluster, tiny_llama: str, unsharded: PreTrainedModel) -> None:
    """A worker that is no fork behaves as one that is, beside another cluster."""
    with ll.Cluster([ll.Device(name="a", threads=1)], _forks=False) as cluster:
        assert cluster.pids["a"] not in shared_cluster.pids.values()
        (worker,) = family(cluster)
        with ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, progress=False) as model:
            assert torch.equal(greedy(model), greedy(unsharded))
            worker.kill()
            with pytest.raises(ll.WorkerDiedError, match=r"'a' died \(killed by signal 9"):
                greedy(model)
        assert cluster.pids == {}
    assert are_gone([worker])


# --- closing


def test_closing_while_workers_start_leaves_nothing(own_fork_server: None) -> None:
    cluster = ll.Cluster(2)
    server = fork_server(cluster)
    waiting = threading.Thread(target=pytest.raises, args=(ll.ClosedError, cluster.wait))
    waiting.start()
    cluster.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert are_gone([server])
    cluster.close()
    assert cluster.closed
    for use in (cluster.wait, cluster.workers, lambda: cluster.pids):
        with pytest.raises(ll.ClosedError):
            use()


def test_a_fork_server_that_dies_at_once_is_told(own_fork_server: None) -> None:
    with ll.Cluster(1) as cluster:
        fork_server(cluster).kill()
        with pytest.raises(ll.WorkerDiedError, match=r"'worker-0' died \(it was not started.* killed by signal 9"):
            cluster.wait()
        assert cluster.pids == {}


# --- what workers say


def test_a_workers_log_records_arrive_under_its_device(
    shared_cluster: ll.Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    shared_cluster.wait()
    engine = shared_cluster._engine
    engine._post(lambda: engine._mailbox.send("b", b"no message"))
    wait_until(lambda: bool(caplog.records))
    (record,) = caplog.records
    assert (record.name, record.levelno, record.device) == ("lingualinked.transport", logging.WARNING, "b")  # type: ignore[attr-defined]
    assert record.getMessage().startswith("[b] mailbox 'b' refused input from caller (no message)")
    assert {worker.device: worker.num_refused for worker in shared_cluster.workers()}["b"] >= 1


def test_a_stranger_is_refused_and_the_caller_hears_of_it(
    shared_cluster: ll.Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    shared_cluster.wait()
    address, key = shared_cluster._engine.peer("c")
    with ZmqMailbox("stranger", generate_keypair()) as stranger:
        stranger.connect("c", address, key)
        wait_until(lambda: bool(caplog.records))  # though worker c is idle, and its own thread asleep
    assert caplog.records[0].device == "c"  # type: ignore[attr-defined]
    assert "not authorised" in caplog.text


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"devices": 0}, "at least 1"),
        ({"devices": -2}, "at least 1"),
        ({"devices": True}, "number of local workers"),
        ({"devices": "all"}, "neither 'auto', nor a cluster file"),
        ({"devices": []}, "empty"),
        ({"devices": ["a"]}, "not a lingualinked.Device"),
        ({"devices": [ll.Device(name="a"), ll.Device(name="b"), ll.Device(name="a")]}, "two devices are named 'a'"),
        ({"devices": [ll.Device(name="a", cpus=(10**6,))]}, "cores \\[1000000\\] are not among"),
        ({"devices": 1, "timeout_s": 0}, "timeout_s=0"),
        ({"devices": 1, "timeout_s": float("inf")}, "timeout_s=inf"),
        ({"devices": 1, "timeout_s": "1"}, "timeout_s='1'"),
        ({"devices": 1, "advertise": "*"}, "advertise='\\*'"),
        ({"devices": 1, "max_frame_bytes": 0}, "max_frame_bytes=0"),
        ({"devices": 1, "max_frame_bytes": 1500}, "max_frame_bytes=1500 can't carry every message"),
        ({"devices": 1, "max_frame_bytes": 0.5}, "max_frame_bytes=0.5"),
        ({"devices": 1, "shared_memory": "no"}, "shared_memory='no' must be True or False"),
    ],
)
def test_what_no_cluster_can_be_made_of(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ll.ArgumentError, match=words):
        ll.Cluster(**arguments)


def test_a_cluster_knows_its_devices(shared_cluster: ll.Cluster) -> None:
    assert shared_cluster.device("b").threads == 1
    with pytest.raises(ll.ArgumentError, match="no device 'z'"):
        shared_cluster.device("z")
    assert "a, b, c, d" in repr(shared_cluster)

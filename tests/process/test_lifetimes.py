"""Workers live as long as who uses them, however that ends, and never longer."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import lingualinked as ll
from processes import Script, are_gone, family, fork_server, stopped
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow]

IDS = torch.tensor([[1, 17, 93, 54, 8]])


def greedy(model: Any, num_tokens: int = 12, **arguments: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, **arguments)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What goes in this test goes with its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# --- the last reference


def test_dropping_the_last_reference_ends_the_workers(tiny_llama: str, no_collector: None) -> None:
    model: Any = ll.ShardedModel.from_pretrained(tiny_llama, devices=2, plan="even", progress=False)
    processes = family(model.cluster)
    greedy(model)
    with pytest.raises(ll.ArgumentError):  # no error may keep the model either, once it is dealt with
        model(IDS, position_ids=torch.tensor([[0, 1, 2]]))
    with pytest.raises(ll.ArgumentError):
        model.generate(torch.tensor([[999]]), max_new_tokens=2)
    past = model(IDS).past_key_values
    del model  # returns once they are gone
    assert are_gone(processes)
    with pytest.raises(ll.ClosedError):
        past.session.step(IDS[:, :1], None, None, 1)


def test_dropping_a_model_frees_its_stages(shared_cluster: ll.Cluster, tiny_llama: str, no_collector: None) -> None:
    model: Any = ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan="even", progress=False)
    snapshot, pipeline = model.telemetry, model._pipeline
    assert len(snapshot.stages) == 4
    number = pipeline._model
    del model, pipeline
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan="even", progress=False) as next_model:
        from lingualinked.cluster.workers.inspection import inspect_workers

        reports = inspect_workers(next_model._pipeline._engine, "abcd", 30)
        assert all(stage.model != number for report in reports for stage in report.stages)


def test_dropping_a_session_frees_its_kv(sharded: Any, no_collector: None) -> None:
    past = sharded(IDS).past_key_values
    assert num_sessions(sharded) == [1, 1, 1]
    del past
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_the_last_reference_may_go_on_a_thread_of_ours(own_fork_server: None) -> None:
    cluster = ll.Cluster(1)
    server = fork_server(cluster)
    engine, holder = cluster._engine, [cluster]
    del cluster
    engine._post(holder.clear)
    wait_until(lambda: are_gone([server]))


# --- one of several calls ends


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ZeroDivisionError])
def test_a_call_that_ends_early_ends_alone(
    sharded: Any, unsharded: PreTrainedModel, error: type[BaseException] | None
) -> None:
    go_on = threading.Event()

    def ends(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        is_third = input_ids.shape[1] == IDS.shape[1] + 3
        if is_third and error is not None:
            raise error
        return torch.full((len(input_ids),), is_third)

    def waits(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        assert go_on.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(greedy, sharded, stopping_criteria=[waits]) for _ in range(2)]
        wait_until(lambda: num_sessions(sharded) == [2, 2, 2])  # both are in the middle of it
        if error is None:
            assert greedy(sharded, 10**6, stopping_criteria=[ends]).shape[1] == IDS.shape[1] + 3
        else:
            with pytest.raises(error):
                greedy(sharded, 10**6, stopping_criteria=[ends])
        wait_until(lambda: num_sessions(sharded) == [2, 2, 2])
        assert greedy(sharded, 10**6, max_time=0.0).shape[1] == IDS.shape[1] + 1
        go_on.set()
        for other in others:
            assert torch.equal(other.result(60), greedy(unsharded))
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_an_interrupt_while_a_model_loads(shared_cluster: ll.Cluster, tiny_llama: str, sharded: Any) -> None:
    engine, pid = shared_cluster._engine, shared_cluster.pids["d"]
    stopped(pid)

    def interrupt() -> None:
        wait_until(lambda: len(engine._exchange._pending._pending) == 1)  # three stages are loaded, the last one waits
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, progress=False)
    finally:
        os.kill(pid, signal.SIGCONT)
        thread.join()
    wait_until(lambda: sum(worker.resident_bytes > 0 for worker in shared_cluster.workers()) == 4)
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan="even", progress=False) as model:
        assert len(model.telemetry.stages) == 4


def test_an_exception_inside_the_with_block(shared_cluster: ll.Cluster, tiny_llama: str) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, progress=False) as model,
    ):
        raise ZeroDivisionError
    with pytest.raises(ll.ClosedError):
        greedy(model)


# --- forked children


def in_child(use: Callable[[], object]) -> str:
    """Do something in a forked child; return the error that it raised there."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
        pid = os.fork()
    if pid == 0:
        try:
            use()
            os.write(writer, b"no error")
        except BaseException as error:  # noqa: BLE001
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    assert os.waitpid(pid, 0)[1] == 0
    with os.fdopen(reader) as answer:
        return answer.read()


def test_a_forked_child_is_refused_and_stops_nothing(
    sharded: Any, unsharded: PreTrainedModel, shared_cluster: ll.Cluster
) -> None:
    past = sharded(IDS).past_key_values
    endpoint = sharded.telemetry.serve(0)
    for use in (
        lambda: greedy(sharded),
        lambda: sharded(IDS),
        lambda: sharded(IDS[:, :1], past_key_values=past),
        lambda: sharded.telemetry,
        shared_cluster.wait,
        shared_cluster.workers,
    ):
        assert in_child(use).startswith("UnsupportedOperationError: a cluster can't be used in a forked child")
    for harmless in (past.end, endpoint.close, sharded.close, shared_cluster.close, gc.collect):
        assert in_child(harmless) == "no error"
    with endpoint, urllib.request.urlopen(endpoint.url) as metrics:
        assert metrics.status == 200
    assert sharded(IDS[:, :1], past_key_values=past).logits.shape == (1, 1, 128)
    assert torch.equal(greedy(sharded), greedy(unsharded))


def test_a_data_loader_with_a_worker_process(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = [torch.tensor([1, 40 + index]) for index in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loader = DataLoader(prompts, batch_size=2, num_workers=1, multiprocessing_context="fork")  # type: ignore[arg-type]
        for batch in loader:
            assert torch.equal(sharded(batch).logits, unsharded(batch).logits)
    assert torch.equal(greedy(sharded), greedy(unsharded))


# --- a script of a user

BEGIN = """
import ctypes, json, os, sys, threading, time
import torch
import lingualinked as ll
from transformers import LlamaConfig

def say(what):
    print(json.dumps(what), flush=True)

def make(num_workers):
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    return ll.ShardedModel.from_pretrained(
        "dummy", config=config, load_format="dummy", devices=num_workers, progress=False
    )

def pids(model):
    return [*model.cluster.pids.values(), model.cluster._workers.launcher._starter.server.process.pid]

ids = torch.tensor([[1, 2, 3]])
"""

INTERRUPTED = """
made = []
thread = threading.Thread(target=lambda: made.append(make(2)))
thread.start()
thread.join()
(model,) = made
say(pids(model))

def running(ids, scores, **_):
    if ids.shape[1] == 6:
        say("running")
    return torch.zeros(len(ids), dtype=torch.bool)

for _ in range(2):
    try:
        model.generate(ids, max_new_tokens=10**6, do_sample=False, eos_token_id=None, stopping_criteria=[running])
    except KeyboardInterrupt:
        say("interrupted")
while any(stage.num_sessions for stage in model.telemetry.stages):
    time.sleep(0.01)
say(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).tolist())
sys.stdin.read()
"""


def test_a_model_made_in_a_thread_interrupted_twice_and_left_open(tmp_path: Path) -> None:
    """The model outlives the thread that made it and every Ctrl-C; at the end nobody closes it."""
    with Script(BEGIN + INTERRUPTED, tmp_path) as script:
        workers = [psutil.Process(pid) for pid in script.hear()]
        assert len(workers) == 3
        for _ in range(2):
            assert script.hear() == "running"
            script.process.send_signal(signal.SIGINT)
            assert script.hear() == "interrupted"
        ((*prompt, _, _, _, _),) = script.hear()
        assert prompt == [1, 2, 3]
        assert all(worker.is_running() for worker in workers)
        assert script.end() == 0
        assert "Traceback" not in script.errors()
        wait_until(lambda: are_gone(workers))


STILL_GENERATING = """
running = threading.Event()

def criterion(ids, scores, **_):
    if ids.shape[1] == 6:
        running.set()
    return torch.zeros(len(ids), dtype=torch.bool)

model = make(2)
arguments = {"max_new_tokens": 10**6, "do_sample": False, "eos_token_id": None, "stopping_criteria": [criterion]}
threading.Thread(target=model.generate, args=(ids,), kwargs=arguments, daemon=True).start()
running.wait()
"""


def test_a_daemon_thread_that_generates_while_the_interpreter_ends(tmp_path: Path) -> None:
    with Script(BEGIN + STILL_GENERATING, tmp_path) as script:
        assert script.end() == 0
        assert "Traceback" not in script.errors()


def test_stripped_docstrings_are_named(tiny_llama: str) -> None:
    load = "import sys, lingualinked as ll; ll.ShardedModel.from_pretrained(sys.argv[1], devices=1)"
    done = subprocess.run([sys.executable, "-OO", "-c", load, tiny_llama], capture_output=True, text=True, check=False)
    assert "UnsupportedOperationError: python -OO (or PYTHONOPTIMIZE=2) strips docstrings" in done.stderr


KILLED = """
model = make(2)
model(ids)
child = os.fork()
if child == 0:
    threading.Event().wait()
# One that runs no hook of Python's, as a library in C makes it, and keeps a copy of every descriptor.
without_hooks = ctypes.PyDLL(None).fork()
if without_hooks == 0:
    ctypes.PyDLL(None).pause()
model(ids)
say([pids(model), [child, without_hooks]])
threading.Event().wait()
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="where there is no pidfd, a child that holds the pipe hides the end"
)
def test_workers_end_when_their_caller_is_killed_though_its_children_live(tmp_path: Path) -> None:
    with Script(BEGIN + KILLED, tmp_path) as script:
        workers, children = ([psutil.Process(pid) for pid in each] for each in script.hear())
        try:
            stopped(workers[0].pid)  # and though one of them can't see it
            script.process.kill()
            wait_until(lambda: are_gone(workers))
            assert not any(are_gone([child]) for child in children)
        finally:
            for process in (*children, *workers):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        wait_until(lambda: are_gone(children))


RAISES = """
import msgspec, psutil, zmq  # what has been imported already, as in a notebook, can't be shadowed any more
sys.path.insert(0, os.path.dirname(__file__))
model = make(1)
with model:
    say(pids(model))
    without_hooks = ctypes.PyDLL(None).fork()
    if without_hooks == 0:
        ctypes.PyDLL(None).pause()
    say([without_hooks])
    model(ids)
    raise RuntimeError("of the user's own")
"""


def test_a_script_that_raises_beside_files_of_unlucky_names(tmp_path: Path) -> None:
    """Workers import neither from the working folder nor from that of the script."""
    elsewhere, beside = tmp_path / "elsewhere", tmp_path / "script"
    for folder in (elsewhere, beside):
        folder.mkdir()
        for name in ("msgspec", "psutil", "torch", "zmq"):
            (folder / f"{name}.py").write_text(f"raise RuntimeError('the file {name}.py of the user was imported')")
    with Script("import sys; sys.path.pop(0)" + BEGIN + RAISES, beside, cwd=elsewhere) as script:
        workers = [psutil.Process(pid) for pid in script.hear()]
        (child,) = (psutil.Process(pid) for pid in script.hear())
        try:
            assert script.end() == 1
            assert "RuntimeError: of the user's own" in script.errors()
            assert are_gone(workers)
        finally:
            child.kill()
        wait_until(lambda: are_gone([child]))

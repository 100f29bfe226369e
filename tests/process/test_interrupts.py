"""Interrupts at random moments of loading, generating, moving and measuring: none is lost, and none leaves anything behind.

``make interrupts`` sends 300 of them beside busy processes; the suite sends a few.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lingualinked as ll
from jupyter_kernels import Kernel
from lingualinked.cluster.workers.observer import Observer
from processes import Script

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals"),
]

NUM_INTERRUPTS = int(os.environ.get("LINGUALINKED_NUM_INTERRUPTS", "6"))
SHARE = max(NUM_INTERRUPTS // 3, 1)
IS_MANY = NUM_INTERRUPTS >= 100
PATIENCE_S = 900.0 if IS_MANY else 90.0  # many come beside busy processes, and may run at the lowest priority
LONGEST_S = {
    "load": 3.0,
    "generate": 0.5,
    "run": 0.5,
    "split": 0.7,
    "chunks": 0.7,
    "batch": 1.0,
    "manager": 1.0,
    "rebalance": 1.0,
    "profile": 2.0,
    "hooks": 1.0,
}

# What is interrupted never ends by itself; after it, nothing may be there that was not before.
BEGIN = """
import json, os, tempfile, threading, time
import psutil, torch
import lingualinked as ll
from transformers import GenerationConfig

def say(what):
    print(json.dumps(what), flush=True)

path, ids = ll.sample_model(), torch.tensor([[1, 5, 17]])
plans = [ll.Plan.from_spans([("a", 0, cut), ("b", cut, 8)]) for cut in (3, 5)]
devices = [ll.Device(name=name, threads=1) for name in "ab"]

def load():
    ll.ShardedModel.from_pretrained(path, devices=devices, plan="even").close()

def generate(prompt=ids, **arguments):
    model.generate(prompt, **{"max_new_tokens": 60, "do_sample": True, "eos_token_id": None, **arguments})

def run():
    generate(do_sample=False, max_new_tokens=200)

def split():
    generate(ids.repeat(4, 1), num_microbatches=2)

def chunks():
    generate(ids.repeat(2, 40), max_new_tokens=5, prefill_chunk_size=8, num_microbatches=2)

def batch():
    prompts = [[1, 5, *range(17, 17 + length)] for length in range(6)]
    model.generate_batch(prompts, GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1))

def manager():
    settings = GenerationConfig(max_new_tokens=40, do_sample=True, eos_token_id=-1)
    with model.continuous_batching_context_manager(settings) as served:
        names = [served.add_request([1, 5, 17 + index], streaming=index == 0) for index in range(4)]
        for _ in served.request_id_iter(names[0]):
            pass

def rebalance():
    for plan in plans:
        model.rebalance(plan)

def profile():
    ll.profile_model(path, model.cluster, refresh=True)

def hooks():
    layers = model.model.layers
    with layers[2].register_forward_hook(lambda *_: time.sleep(0.001)), ll.hook(layers[6].mlp, torch.neg, positions=-1):
        generate()

def warm_up(verbs):
    for verb in sorted(verbs):  # threads and files that the first use of each leaves are there before it is interrupted
        globals()[verb]()

def held():
    names = sorted(thread.name for thread in threading.enumerate() if type(thread).__name__ != "TMonitor")
    children = sorted(child.pid for child in psutil.Process().children(recursive=True))
    return [names, children, sorted(os.listdir(tempfile.gettempdir()))]

def go_on(verb):
    while True:
        globals()[verb]()

def left(before):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (held() != before or sum(s.num_sessions for s in model.telemetry.stages)):
        time.sleep(0.02)
    return [held() == before, sum(s.num_sessions for s in model.telemetry.stages), held(), before]
"""

SCRIPT = """
with ll.ShardedModel.from_pretrained(path, devices=devices, plan=plans[0], progress=False) as model:
    verbs = os.environ["VERBS"].split()
    warm_up({*verbs} - {"load"})
    before = held()
    for verb in verbs:
        say(["begin", verb])
        try:
            go_on(verb)
        except KeyboardInterrupt:
            say(["interrupted", *left(before)])
        except BaseException as error:
            say(["lost", repr(error)])
    say(["tokens", model.generate(ids, max_new_tokens=3, eos_token_id=None).shape[1]])
"""


@pytest.fixture(scope="module", autouse=True)
def load() -> Iterator[None]:
    """Other work on the machine, while many interrupts are sent."""
    busy = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(busy) for _ in range(2 if IS_MANY else 0)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """A shell's background jobs ignore interrupts, and so does what they start; with a handler here, that is undone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def verbs(moments: random.Random) -> list[str]:
    """What each interrupt comes in: everything as often, in a random order, of which a few interrupts see a part."""
    return [
        verb for _ in range(SHARE // len(LONGEST_S) + 1) for verb in moments.sample(list(LONGEST_S), len(LONGEST_S))
    ]


@pytest.fixture
def moments() -> random.Random:
    seed = int(os.environ.get("LINGUALINKED_SEED", random.randrange(10**6)))
    sys.stdout.write(f"LINGUALINKED_SEED={seed}" + "\n")
    return random.Random(seed)


def test_while_a_model_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for last reports: of a model that is let go then, nothing would ever free the workers."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = ll.ShardedModel.from_pretrained(ll.sample_model(), devices=2, plan="even", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Observer, "inspect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.close()
    assert model.cluster.closed


def show_progress(index: int) -> None:
    if (index + 1) % 10 == 0:
        sys.stdout.write(f"{index + 1} of {SHARE}, none lost\n")
        sys.stdout.flush()


@pytest.mark.timeout(0 if IS_MANY else 300)
def test_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: random.Random, verbs: list[str]) -> None:
    monkeypatch.setenv("VERBS", " ".join(verbs[:SHARE]))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with Script(BEGIN + SCRIPT, tmp_path) as script:
        for index in range(SHARE):
            assert script.hear(PATIENCE_S) == ["begin", verbs[index]]
            time.sleep(moments.uniform(0, LONGEST_S[verbs[index]]))
            script.process.send_signal(signal.SIGINT)
            outcome = script.hear(PATIENCE_S)
            assert outcome[:3] == ["interrupted", True, 0], (index, verbs[index], outcome)
            show_progress(index)
        assert script.hear(PATIENCE_S) == ["tokens", 6]
        assert script.end(PATIENCE_S) == 0
    sys.stdout.write(f"{SHARE} interrupts of a script, none lost" + "\n")


@pytest.mark.timeout(0 if IS_MANY else 300)
def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: random.Random) -> None:
    """A process of its own each time, so that imports are interrupted, too."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")  # one that does not end says where it is
    program = str(Path(sys.executable).with_name("lingualinked"))
    command = [program, "generate", str(ll.sample_model()), "Once", "--max-new-tokens", "200"]
    began_s = time.monotonic()
    subprocess.run(command, capture_output=True, check=True)
    longest_s, num_late, num_interrupted = time.monotonic() - began_s, 0, 0
    while num_interrupted < SHARE:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        began_s = time.monotonic()
        try:
            process.wait(moments.uniform(0.1 * longest_s, 0.9 * longest_s))
            longest_s = min(longest_s, time.monotonic() - began_s)  # the machine was busier at first
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            output, _ = process.communicate()
            raise AssertionError(f"an interrupt is lost, {num_interrupted} were not:\n{output}") from None
        if process.returncode == 0 and num_late < SHARE:
            num_late += 1  # it may have ended before; an interrupt that is lost shows in these being many
            continue
        assert process.returncode in (130, -signal.SIGINT), (num_interrupted, process.returncode, output)
        show_progress(num_interrupted)
        num_interrupted += 1
        assert list((tmp_path / "temporary").glob("lingualinked-*")) == []
    sys.stdout.write(f"{SHARE} interrupts of the command line, {num_late} ended before" + "\n")


NOTEBOOK = """
model = ll.ShardedModel.from_pretrained(path, devices=devices, plan=plans[0], progress=False)
warm_up({*VERBS} - {"load"})
before = held()
"""


@pytest.mark.timeout(0 if IS_MANY else 300)
def test_in_a_notebook(
    jupyter_event_loop: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moments: random.Random,
    verbs: list[str],
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    kernel = Kernel(PATIENCE_S)
    try:
        kernel.run(f"{BEGIN}\nVERBS = {verbs[:SHARE]}\n{NOTEBOOK}")
        for index in range(SHARE):
            verb = verbs[index]
            reply = kernel.interrupt(
                f"print('begin', flush=True); go_on({verb!r})", moments.uniform(0, LONGEST_S[verb])
            )
            assert reply.get("ename") == "KeyboardInterrupt", (index, verb, reply)
            outcome = kernel.run("print(json.dumps(left(before)))")
            assert outcome.startswith("[true, 0"), (index, verb, outcome)
            show_progress(index)
        kernel.run("model.close()")
    finally:
        kernel.close()
    sys.stdout.write(f"{SHARE} interrupts of a notebook's kernel, none lost" + "\n")

"""Ctrl-C and ``kill -9`` of a user's process inside a hook, and while it waits for one: with real signals."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from processes import Script, are_gone, stopped
from waiting import wait_until

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals"),
]

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
import lingualinked as ll

def say(what):
    print(json.dumps(what), flush=True)

def hear():
    return json.loads(sys.stdin.readline())

def wait(*_):
    say("in a hook")
    while True:
        time.sleep(0.01)

def held():
    return [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in model.cluster.pids.values()]

ids = torch.tensor([[1, 5, 17]])
plan = ll.Plan.from_spans([("a", 0, 4), ("b", 4, 8)])
devices = [ll.Device(name=name, threads=1) for name in "ab"]
with ll.ShardedModel.from_pretrained(ll.sample_model(), devices=devices, plan=plan, progress=False) as model:
    layers = model.model.layers
    for layer in layers[2], layers[6]:
        with layer.register_forward_hook(lambda *_: None):
            expected = model(ids).logits
    before = held()
    say(model.cluster.pids)
    for layer, hook in (layers[2], wait), (layers[6], wait), (layers[2], lambda *_: say("done")):
        hear()
        try:
            with layer.register_forward_hook(hook):
                model(ids)
        except KeyboardInterrupt:
            say("interrupted")
        hear()
        deadline = time.monotonic() + 60
        while sum(stage.num_sessions for stage in model.telemetry.stages) and time.monotonic() < deadline:
            time.sleep(0.01)
        left = [held() == before, sum(stage.num_sessions for stage in model.telemetry.stages)]
        say([torch.equal(model(ids).logits, expected), *left])
    with layers[6].register_forward_hook(wait):
        model(ids)
"""


def test_signals(tmp_path: Path) -> None:
    with Script(SCRIPT, tmp_path) as script:
        pids = script.hear()

        def go_on() -> None:
            assert script.process.stdin is not None
            script.process.stdin.write(b"1\n")

        # 1) an interrupt inside a hook, of the first stage and of the last one
        for _ in range(2):
            go_on()
            assert script.hear() == "in a hook"
            script.process.send_signal(signal.SIGINT)
            assert script.hear() == "interrupted"
            go_on()
            assert script.hear() == [True, True, 0]
        # 2) an interrupt while the step runs on behind a hook, in a worker that is stopped
        stopped(pids["b"])
        go_on()
        assert script.hear() == "done"
        script.process.send_signal(signal.SIGINT)
        assert script.hear() == "interrupted"
        os.kill(pids["b"], signal.SIGCONT)
        go_on()
        assert script.hear() == [True, True, 0]
        # 3) the death of the process inside a hook
        assert script.hear() == "in a hook"
        workers = [psutil.Process(pid) for pid in pids.values()]
        script.process.kill()
        wait_until(lambda: are_gone(workers))

"""In Jupyter: running the cell again, interrupting a generation and restarting the kernel leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from jupyter_kernels import Kernel
from waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow]

MAKE = "import lingualinked as ll; model = ll.ShardedModel.from_pretrained({path!r}, devices=2, plan='even')"
WORKERS = "print(*sorted(model.cluster.pids.values()))"
ENDLESS = """
import torch
class Announce:
    def put(self, value): print("token", flush=True)
    def end(self): pass
model.generate(torch.tensor([[1, 5]]), max_new_tokens=500, eos_token_id=None, streamer=Announce())
"""


@pytest.fixture
def kernel(jupyter_event_loop: None) -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


def alive(pids: list[int]) -> bool:
    return any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_a_notebooks_life(kernel: Kernel, tiny_llama: str) -> None:
    kernel.run(MAKE.format(path=tiny_llama))
    first = [int(pid) for pid in kernel.run(WORKERS).split()]
    kernel.run(MAKE.format(path=tiny_llama))  # the old model goes when its name is bound anew
    second = [int(pid) for pid in kernel.run(WORKERS).split()]
    assert not set(first) & set(second)
    wait_until(lambda: not alive(first))

    reply = kernel.interrupt(ENDLESS)
    assert reply["ename"] == "KeyboardInterrupt"
    kernel.run("import time; deadline = time.monotonic() + 20")
    kernel.run("while any(s.num_sessions for s in model.telemetry.stages): assert time.monotonic() < deadline")
    kernel.run("assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=3).shape[1] <= 5")

    assert alive(second)
    kernel.manager.restart_kernel(now=True)
    wait_until(lambda: not alive(second))

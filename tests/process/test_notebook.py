"""In Jupyter: running the cell again, interrupting a generation and restarting the kernel leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from jupyter_client.manager import KernelManager

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


class Kernel:
    """A Jupyter kernel, and what its cells print."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str) -> str:
        printed, reply = self.start(code), None
        while reply is None:
            reply = self._next(printed)
        assert reply["status"] == "ok", reply
        return "".join(printed)

    def start(self, code: str) -> list[str]:
        self.message_id = self.client.execute(code)
        return []

    def _next(self, printed: list[str]) -> dict[str, Any] | None:
        message = self.client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == self.message_id:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return self.client.get_shell_msg(timeout=60)["content"]
        return None

    def interrupt_after_first_token(self) -> dict[str, Any]:
        printed = self.start(ENDLESS)
        while "token" not in "".join(printed):
            self._next(printed)
        self.manager.interrupt_kernel()
        reply = None
        while reply is None:
            reply = self._next(printed)
        return reply

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


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

    reply = kernel.interrupt_after_first_token()
    assert reply["ename"] == "KeyboardInterrupt"
    kernel.run("import time; deadline = time.monotonic() + 20")
    kernel.run("while any(s.num_sessions for s in model.telemetry.stages): assert time.monotonic() < deadline")
    kernel.run("assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=3).shape[1] <= 5")

    assert alive(second)
    kernel.manager.restart_kernel(now=True)
    wait_until(lambda: not alive(second))

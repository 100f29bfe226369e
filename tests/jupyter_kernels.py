"""A Jupyter kernel that runs cells beside the tests.

Knows the kernel's messages; nothing of models.
"""

from __future__ import annotations

import time
from typing import Any

from jupyter_client.manager import KernelManager


class Kernel:
    """A Jupyter kernel, and what its cells print; ``timeout_s`` bounds the wait for each of its messages."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=self._timeout_s)

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
        message = self.client.get_iopub_msg(timeout=self._timeout_s)
        if message["parent_header"].get("msg_id") == self.message_id:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return self._reply()
        return None

    def _reply(self) -> dict[str, Any]:
        while True:  # a kernel that was slow to start answers several times that it is ready
            reply = self.client.get_shell_msg(timeout=self._timeout_s)
            if reply["parent_header"].get("msg_id") == self.message_id:
                content: dict[str, Any] = reply["content"]
                return content

    def interrupt(self, code: str, after_s: float = 0.0) -> dict[str, Any]:
        """Run a cell, and interrupt it so long after it has printed something; return the kernel's reply."""
        printed = self.start(code)
        while not printed:
            assert self._next(printed) is None, printed
        time.sleep(after_s)
        self.manager.interrupt_kernel()
        reply = None
        while reply is None:
            reply = self._next(printed)
        return reply

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()

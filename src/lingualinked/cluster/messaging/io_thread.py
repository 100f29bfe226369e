"""The cluster's own I/O thread, which alone sends and receives: others queue calls, and it wakes for them.

Knows its mailbox and the one exchange that runs on it; not what is sent.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Iterable

from lingualinked.cluster.messaging.exchange import Exchange, closed
from lingualinked.cluster.messaging.pending import settle
from lingualinked.cluster.messaging.reach import Reach
from lingualinked.cluster.remote.locating import resolve_advertised
from lingualinked.device import CALLER
from lingualinked.errors import StepTimeoutError, UnsupportedOperationError
from lingualinked.host_id import host_id
from lingualinked.processes.resources import start_thread
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

logger = logging.getLogger("lingualinked.cluster")

START_S = 60.0
_STOP_S = 2.0


def end_with_interpreter() -> None:
    """Stop a daemon thread where it is if the interpreter is ending: it closes clusters, and nobody hears of an error."""
    if threading.current_thread().daemon and not threading.main_thread().is_alive():
        threading.Event().wait()


class IOThread:
    """The thread on which the exchange of one cluster runs; any other may queue calls."""

    def __init__(
        self,
        devices: Iterable[str],
        socket_folder: str | None,
        max_frame_bytes: int,
        shared_memory: bool,
        advertise: str | None,
    ) -> None:
        self._socket_folder = socket_folder
        self._reach = Reach(host_id(), resolve_advertised(advertise))
        self._shared_memory = shared_memory
        self._max_frame_bytes = max_frame_bytes
        self._owner_pid = os.getpid()
        # Reentrant: a finalizer posts, and the garbage collector may run one in the middle of a post.
        self._lock = threading.RLock()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._stopping = False
        self._mailbox: Mailbox
        self._exchange: Exchange
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        arguments = (tuple(devices), ready)
        self._thread = threading.Thread(target=self._run, args=arguments, name="lingualinked-io", daemon=True)
        start_thread(self._thread)
        try:
            ready.result(START_S)
        except BaseException:
            self._stopping = True
            ready.add_done_callback(lambda done: None if done.exception() else self._mailbox.wake())
            raise

    def check_open(self) -> None:
        """Raise `ClosedError` if the cluster is closed, or what `check_owner` raises."""
        self.check_owner()
        if self._stopping:
            raise closed()

    def check_owner(self) -> None:
        """Raise `UnsupportedOperationError` in a forked child of the process that made the cluster."""
        if os.getpid() != self._owner_pid:
            raise UnsupportedOperationError(
                "a cluster can't be used in a forked child of the process that made it: make one there, or use threads"
            )

    def stop(self) -> None:
        """End the I/O thread; whatever is pending fails with `ClosedError`."""
        with self._lock:
            self._stopping = True
        self._mailbox.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_S)

    def _run(self, devices: tuple[str, ...], ready: concurrent.futures.Future[None]) -> None:
        try:
            self._mailbox = ZmqMailbox(
                CALLER,
                generate_keypair(),
                ipc=self._socket_folder is not None,  # a folder that children of this process remove after a kill -9
                socket_folder=self._socket_folder,
                shared_memory=self._shared_memory,
                max_frame_bytes=self._max_frame_bytes,
            )
        except BaseException as error:  # noqa: BLE001 - whoever makes the engine raises it
            ready.set_exception(error)
            return
        exchange = self._exchange = Exchange(self._mailbox, devices, self._post, self._reach)
        ready.set_result(None)
        try:
            while not self._stopping:
                self._run_commands()
                exchange.handle_next(0 if self._commands else None)
        except BaseException:
            logger.exception("the I/O thread failed")
            raise
        finally:
            with self._lock:  # nothing is posted after this
                self._stopping = True
            self._run_commands()  # sends to closed ears; what they ask is then pending
            exchange.close()

    def _run_commands(self) -> None:
        while self._commands:
            try:
                self._commands.popleft()()
            except Exception:  # what waits for an answer has been failed; the others go on
                logger.exception("a message could not be sent")

    def _call(self, command: Callable[[], None]) -> None:
        """Run a command on the I/O thread and wait until it is done."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._post(lambda: settle(done, command))
        if not concurrent.futures.wait([done], START_S).done:
            raise StepTimeoutError(
                f"the cluster's I/O thread did not answer within {START_S:g} s: is the machine overloaded?"
            )
        done.result()

    def _post(self, command: Callable[[], None]) -> None:
        self.check_owner()
        with self._lock:
            if self._stopping:
                raise closed()
            self._commands.append(command)
        self._mailbox.wake()

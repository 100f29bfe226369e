"""The workers of one cluster that daemons on other hosts start, and the thread that speaks with the daemons.

Knows connections and threads; not what the workers do, nor who decides what they are told.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import zmq

from lingualinked.address import Address
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.remote.connection import DaemonConnection, KnownDaemon, Lease, NotConnectedError
from lingualinked.cluster.remote.resolving import PROBE_S, resolve_address, why_unreachable
from lingualinked.device import Device
from lingualinked.errors import ClosedError, DaemonError, WorkerDiedError
from lingualinked.processes.resources import start_thread
from lingualinked.protocol.boot import GRACE_S, Boot
from lingualinked.protocol.daemon import ANSWER_S
from lingualinked.transport.keys.key_files import find_client_keys
from lingualinked.transport.keys.key_lists import find_server_key
from lingualinked.transport.keys.keys import KeyPair
from lingualinked.transport.sockets.waker import Waker

logger = logging.getLogger("lingualinked.cluster")

_LEAVE_S = 2 * GRACE_S + 1.0  # the daemon lets a worker end by itself first, then kills it


class RemoteWorkers:
    """The workers on other hosts of one cluster, one connection each.

    This process enters with ``keys``; ``None``: with those that each device names.
    """

    def __init__(self, class_names: tuple[str, ...], keys: KeyPair | None = None) -> None:
        self._class_names = class_names
        self._keys = keys
        self._owner_pid = os.getpid()
        self._lock = threading.RLock()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._connections: dict[str, DaemonConnection] = {}  # of the thread
        self._on_key: Callable[[str, str], None] = lambda name, public_key: None
        self._on_end: Callable[[str, str], None] = lambda name, how: None
        # Of the thread; by the names of workers that are leased and not started yet: what is to be reported.
        self._unreported: dict[str, list[Callable[[], None]]] = {}
        self._stopping = False
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="lingualinked-daemons", daemon=True)
        try:
            start_thread(self._thread)
        except BaseException:
            self._waker.close()
            raise

    def lease(self, devices: Sequence[Device]) -> list[Lease]:
        """Get a worker for each device from its daemon, all at once; `start` or `add` has to follow.

        A daemon starts the worker at once. Until then, what it says of it is kept.

        Raises
        ------
        DaemonError
            If a daemon can't be reached, does not hold the key that it should, or refuses.
        ArgumentError
            If the key of a daemon is not known, or there is no key of ours.
        """
        deadline_s = time.monotonic() + ANSWER_S
        known = [
            KnownDaemon(
                resolve_address(device, max(0.1, deadline_s - PROBE_S - time.monotonic())),
                find_server_key(device),
                self._keys or find_client_keys(device.key),
            )
            for device in devices
        ]
        try:
            return results_of([self._connect(*each, deadline_s) for each in zip(devices, known, strict=True)])
        except NotConnectedError as error:
            cause = why_unreachable(error.address)
            raise DaemonError(error.device.name, str(error.device.address), cause) from None

    def _connect(self, device: Device, daemon: KnownDaemon, deadline_s: float) -> concurrent.futures.Future[Lease]:
        leased: concurrent.futures.Future[Lease] = concurrent.futures.Future()

        def connect() -> None:
            try:
                before = self._connections.pop(device.name, None)
                if before is not None:  # its daemon did not answer when it was left
                    before.close()
                self._unreported[device.name] = []
                self._connections[device.name] = DaemonConnection(
                    self._context,
                    device,
                    daemon,
                    deadline_s,
                    self._class_names,
                    leased,
                    self._report_key,
                    self._report_end,
                )
            except BaseException as error:  # noqa: BLE001 - whoever waits raises it
                leased.set_exception(error)

        if not self._post(connect):
            raise ClosedError("the cluster is closed: make a new one")
        return leased

    def start(
        self, names: Iterable[str], on_key: Callable[[str, str], None], on_end: Callable[[str, str], None]
    ) -> None:
        """From now on, report the keys and ends of these leased workers as a `Launcher` does."""
        self._on_key, self._on_end = on_key, on_end
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Report the key and the end of one more worker that is leased, also if they are known already."""

        def report() -> None:
            for each in self._unreported.pop(name, ()):
                each()

        self._post(report)

    def open_relay(self, hub: str, target: Address) -> concurrent.futures.Future[int]:
        """Make a device's daemon forward bytes to an address; the future gets the port at which that is reached."""
        opened: concurrent.futures.Future[int] = concurrent.futures.Future()

        def open_it() -> None:
            if hub in self._connections:
                self._connections[hub].open_relay(target, opened)
            else:
                opened.set_exception(WorkerDiedError(hub, "its daemon has ended"))

        if not self._post(open_it):
            opened.set_exception(ClosedError("the cluster is closed: make a new one"))
        return opened

    def boot(self, boot: Boot) -> None:
        """Tell the worker of that name who it is."""
        self._post(lambda: self._connections[boot.name].boot(boot) if boot.name in self._connections else None)

    def remove(self, name: str) -> None:
        """End a worker and forget it; returns once it has ended, or its daemon is left alone to end it."""
        self._leave(lambda: [self._connections[name]] if name in self._connections else [])

    def stop(self) -> None:
        """End all workers; returns once they have ended, or their daemons are left alone to end them."""
        if os.getpid() != self._owner_pid:
            return
        self._leave(lambda: list(self._connections.values()))
        with self._lock:
            self._stopping = True
        self._waker.set()
        if self._thread is not threading.current_thread():
            self._thread.join(GRACE_S)

    def _leave(self, choose: Callable[[], list[DaemonConnection]]) -> None:
        """Leave some daemons, and wait until they have ended the workers; one that does not answer is not waited for long."""
        deadline_s = time.monotonic() + _LEAVE_S
        asked: concurrent.futures.Future[list[concurrent.futures.Future[None]]] = concurrent.futures.Future()

        def leave() -> None:
            connections = choose()
            asked.set_result([connection.left for connection in connections])
            for connection in connections:
                connection.leave()

        if self._post(leave) and concurrent.futures.wait([asked], _LEAVE_S).done:
            concurrent.futures.wait(asked.result(), max(0.0, deadline_s - time.monotonic()))

    def _post(self, command: Callable[[], None]) -> bool:
        """Run a command on the thread; return whether there is one."""
        with self._lock:
            if self._stopping:
                return False
            self._commands.append(command)
        self._waker.set()
        return True

    def _run(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            while not self._stopping:
                self._serve()
        finally:
            with self._lock:  # nothing is posted after this
                self._stopping = True
            self._run_commands()  # those who wait for them get an error below
            for connection in self._connections.values():
                connection.close()
            self._waker.close()
            self._context.term()

    def _serve(self) -> None:
        # 1) wait for a daemon, a command, or the time by which a daemon must have answered
        items: list[tuple[zmq.Socket[bytes] | int, int]] = [(self._waker.fileno(), zmq.POLLIN)]
        for connection in self._connections.values():
            items += [(socket, zmq.POLLIN) for socket in connection.sockets]
        deadlines_s = [each.deadline_s for each in self._connections.values() if not each.leased.done()]
        left_s = min(deadlines_s, default=float("inf")) - time.monotonic()
        zmq.zmq_poll(items, -1 if left_s == float("inf") else max(0, int(left_s * 1000) + 1))
        # 2) commands of other threads
        self._waker.clear()
        self._run_commands()
        # 3) what daemons say, and what has happened to connections
        for connection in list(self._connections.values()):
            with _logging_errors(f"what the daemon of device {connection.name!r} says could not be handled"):
                connection.read()
                connection.expire(time.monotonic())
            if not connection.sockets:
                del self._connections[connection.name]

    def _run_commands(self) -> None:
        while self._commands:
            with _logging_errors("a daemon could not be told something"):
                self._commands.popleft()()

    def _report_key(self, name: str, public_key: str) -> None:
        def report() -> None:
            try:
                self._on_key(name, public_key)
            except Exception as error:  # noqa: BLE001 - the cluster is closed, or the key can't be used: who waits hears so
                self._on_end(name, f"it was not let in ({error})")
                if name in self._connections:
                    self._connections[name].leave()

        self._report(name, report)

    def _report_end(self, name: str, how: str) -> None:
        self._report(name, lambda: self._on_end(name, how))

    def _report(self, name: str, report: Callable[[], None]) -> None:
        """Report something now, or once the worker is started: whoever is told would not know it yet."""
        if name in self._unreported:
            self._unreported[name].append(report)
        else:
            report()


@contextlib.contextmanager
def _logging_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception(what)

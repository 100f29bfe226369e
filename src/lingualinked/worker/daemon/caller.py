"""A caller that has entered a daemon, and the worker that it has there.

Knows one launcher; neither sockets nor other callers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lingualinked.address import Address, parse_address
from lingualinked.errors import ResourceError
from lingualinked.processes.launch import Launcher
from lingualinked.processes.resources import start_thread
from lingualinked.protocol.boot import Boot
from lingualinked.protocol.daemon import StartWorker, WorkerLeased
from lingualinked.transport.hosts.relay import Relay
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint

_MOST_RELAYS = 64
Report = Callable[["Caller", str], None]


class Caller:
    """One connection of a client. Its worker belongs to a launcher of its own: no caller sees another's."""

    def __init__(self, routing_id: bytes, client: str, public_key: str, host: str) -> None:
        self.routing_id = routing_id
        self.client = client  # its name among the authorised ones
        self.public_key = public_key
        self.host = host
        self.device = ""  # of the worker; empty: it has had none
        self.limits: WorkerLeased | None = None  # of the worker
        self.is_ending = False
        self._launcher: Launcher | None = None
        self._relays: list[Relay] = []

    def __str__(self) -> str:
        return f"{self.client} at {self.host}"

    def start_worker(self, asked: StartWorker, on_key: Report, on_end: Report) -> None:
        """Start its worker; what it says and how it ends is reported on another thread."""
        self.device = asked.name
        self._launcher = Launcher(asked.class_names)
        self._launcher.start(
            [asked.name], lambda _, public_key: on_key(self, public_key), lambda _, how: on_end(self, how)
        )

    @property
    def socket_folder(self) -> str:
        """Where the worker's socket is to lie."""
        assert self._launcher is not None
        return self._launcher.socket_folder

    def boot_worker(self, boot: Boot) -> None:
        """Tell the worker who it is."""
        assert self._launcher is not None
        self._launcher.boot(boot)

    def open_relay(self, endpoint: TcpEndpoint, target: Address) -> int:
        """Forward bytes to an address while the lease lasts; return the port at which others reach the relay.

        Raises ResourceError or ArgumentError if there are too many, or it can't listen.
        """
        if len(self._relays) >= _MOST_RELAYS:
            raise ResourceError(f"a caller has {_MOST_RELAYS} relays at most")
        relay = Relay(endpoint, target)
        self._relays.append(relay)
        return parse_address(relay.address, "address of a relay", wildcard=True).port

    def end_worker(self, then: Callable[[], None]) -> threading.Thread | None:
        """End its worker and its relays, on a thread, and call ``then``; at once if there are none. Return the thread."""
        launcher, self._launcher = self._launcher, None
        relays, self._relays = self._relays, []
        if launcher is None and not relays:
            then()
            return None

        def end() -> None:
            for relay in relays:
                relay.close()
            if launcher is not None:
                launcher.stop()
            then()

        thread = threading.Thread(target=end, name="lingualinked-ending", daemon=True)
        start_thread(thread)
        return thread

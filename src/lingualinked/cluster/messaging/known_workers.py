"""The workers that a caller can talk to: where they are, what they are, and how they come in.

Knows greetings and introductions; neither requests nor what is asked of workers.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from lingualinked.cluster.messaging.introductions import Introduction, Introductions
from lingualinked.cluster.messaging.reach import Reach, RemoteHost
from lingualinked.cluster.workers.remote_text import readable_environment
from lingualinked.device import CALLER
from lingualinked.environment import Environment
from lingualinked.errors import ProtocolError
from lingualinked.protocol.messages import Hello
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.sockets.awaited_connections import AwaitedConnections


class KnownWorkers(abc.ABC):
    """The workers of a cluster's devices.

    Other threads may read `addresses`, `ended`, `environments`, `failed`, `pids`, `public_keys` and `settled`.
    """

    def __init__(self, mailbox: Mailbox, devices: Iterable[str], reach: Reach) -> None:
        self.addresses: dict[str, str] = {}  # where workers listen, of those that have said hello
        self.pids: dict[str, int] = {}  # of the same, each on its own host
        self.ended: dict[str, str] = {}  # how workers ended, of those that have
        self.failed: dict[str, Exception] = {}  # why workers that are there can't be used
        self.settled = {name: threading.Event() for name in devices}  # set once ready, or never to be
        self.environments: dict[str, Environment] = {}  # what workers compute with, of those that have said hello
        self.public_keys: dict[str, str] = {}  # of the workers that have one by now
        self._mailbox = mailbox
        self._reach = reach
        reach.add_party(CALLER, mailbox.address)
        self._connections = AwaitedConnections(mailbox)
        self.introductions = Introductions(
            reach, self.public_keys, self._ask_to_meet, self._connect_worker, self._admit_worker
        )

    def expect_worker(self, device: str) -> None:
        """Prepare for the worker of a device that is added."""
        self.settled[device] = threading.Event()

    def locate_worker(self, device: str, host: RemoteHost) -> None:
        """Prepare for a worker on another host, before it is authorised: listen where it reaches the caller."""
        self._reach.add_remote(device, host)
        missing = self._reach.missing_endpoint(CALLER, device)
        if missing is not None:
            self._reach.add_endpoint(CALLER, host.local_host, self._mailbox.listen(missing[1]))

    def authorise_worker(self, device: str, public_key: str) -> None:
        """Accept messages that come with a key as those of a device's worker, unless the device has been dropped."""
        if device in self.settled:
            self._mailbox.authorise(device, public_key, same_host=self._reach.shares_host(CALLER, device))
            self.public_keys[device] = public_key

    def greet(self, message: Hello, sender: str) -> None:
        """Take in a worker that says hello; ProtocolError if it has done so before."""
        if sender in self.pids:
            raise ProtocolError(f"{sender!r} has said hello before")
        self._reach.add_party(sender, message.address)
        if not self._reach.uses_network(CALLER, sender):  # otherwise perhaps through a relay
            self._mailbox.connect(sender, message.address, self.public_keys[sender])
        self.environments[sender] = readable_environment(message.environment)
        self.pids[sender] = message.pid
        self._introduce(sender)

    def _introduce(self, device: str) -> None:
        """Introduce a worker and those that are there to each other; it is ready once all have acknowledged it."""
        settled = self.settled[device]

        def ready(error: Exception | None) -> None:
            if self.settled.get(device) is not settled:
                return  # it was dropped meanwhile, and another one may have its name
            if error is not None:
                self.failed[device] = error
            settled.set()

        self.introductions.introduce(device, ready)

    def _connect_worker(self, device: str) -> Future[str]:
        """Connect to a worker that has said where it is, unless it is connected; the future says why that failed, if so."""
        why_not: Future[str] = Future()
        if self._reach.uses_network(CALLER, device):
            self._mailbox.connect(device, self._reach.address(device, CALLER), self.public_keys[device])
            self._connections.add(device, why_not.set_result)
        else:
            why_not.set_result("")
        return why_not

    def _admit_worker(self, device: str) -> set[str]:
        """Let others send to a worker, now that it is connected; return the others that are there."""
        others = self.addresses.keys() - self.ended.keys()
        self.addresses[device] = self._reach.address(device, CALLER)
        return others

    @abc.abstractmethod
    def _ask_to_meet(self, device: str, make: Callable[[int], Introduction], what: str) -> Future[object]:
        """Send a worker the message of an introduction, by the number of the request; return the future of the answer."""

"""A daemon's loop: lets callers in, starts a worker for each, and ends what belongs to a caller that is gone.

Knows messages, callers and one socket, all on one thread; neither weights nor tokens.
"""

from __future__ import annotations

import collections
import contextlib
import ipaddress
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from lingualinked.address import Address, parse_address
from lingualinked.errors import LingualinkedError, ProtocolError, ResourceError, UnsupportedOperationError
from lingualinked.processes.launch import kept_fork_server
from lingualinked.protocol.boot import GRACE_S, WeightFolders
from lingualinked.protocol.daemon import (
    Beat,
    BootWorker,
    Enter,
    Entered,
    FromDaemon,
    Leave,
    Left,
    OpenRelay,
    Refused,
    RelayOpened,
    StartWorker,
    ToDaemon,
    WorkerEnded,
    WorkerKeyMade,
    WorkerLeased,
    check_texts,
    decode_to_daemon,
    encode,
)
from lingualinked.quantities import bytes_text, count_text
from lingualinked.transport.keys.keys import KeyPair
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint
from lingualinked.transport.sockets.waker import Waker
from lingualinked.versions import Versions, installed_versions
from lingualinked.worker.daemon.caller import Caller
from lingualinked.worker.daemon.clients import Clients
from lingualinked.worker.daemon.door import Door
from lingualinked.worker.daemon.host_facts import collect_facts
from lingualinked.worker.daemon.memory_shares import MemoryShares
from lingualinked.worker.daemon.options import DaemonOptions

logger = logging.getLogger("lingualinked.daemon")

BEAT_S = 0.5
"""Seconds between two beats; a caller that can't be reached by one has lost its lease."""

NOBODY_CAME = 3
"""Exit status of a daemon that was to serve one caller, when none came in time."""

_ENDING_S = 2 * GRACE_S + 1.0


class Daemon:
    """Serves callers until it is told to end, or has served the one that it was started for.

    Raises `ResourceError` or `ArgumentError` if it can't listen at its address.
    """

    def __init__(self, options: DaemonOptions, keys: KeyPair, clients: Clients) -> None:
        self._options = options
        self._clients = clients
        self._shares = MemoryShares(options.memory_bytes)
        self._callers: dict[bytes, Caller] = {}
        self._endings: set[threading.Thread] = set()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()  # of other threads
        self._waker = Waker()
        self._status: int | None = None  # to exit with
        self._why = ""
        self._served: Caller | None = None  # once, and nobody else
        try:
            self._door = Door(options.bind, keys, options.name)
        except BaseException:
            self._waker.close()
            raise
        self.address = self._door.address

    def run(self, announce: Callable[[], None]) -> int:
        """Call ``announce`` once callers may come, and serve them; return the exit status."""
        with contextlib.ExitStack() as ends:
            ends.callback(self._waker.close)
            ends.callback(self._end_all)
            ends.callback(self._door.close)  # first, so that callers see the end of the daemon, not of their worker
            ends.enter_context(self._handled_signals())
            self._door.admit(self._clients.names)  # at once: a client that comes meanwhile waits, and is not refused
            ends.enter_context(kept_fork_server())  # it imports torch, before the first caller comes
            announce()
            began_s = next_beat_s = time.monotonic()
            while self._status is None:
                descriptors = [self._waker.fileno(), *([0] if self._options.has_lifeline else [])]
                ready = self._door.wait(max(0.0, next_beat_s - time.monotonic()), descriptors)
                if 0 in ready and not os.read(0, 4096):
                    self.stop(0, "its standard input was closed")
                self._waker.clear()
                while self._commands:
                    with _logged_errors("something could not be done for a caller"):
                        self._commands.popleft()()
                self._receive()
                if time.monotonic() >= next_beat_s:
                    next_beat_s = time.monotonic() + BEAT_S
                    self._beat()
                    self._check_wait(time.monotonic() - began_s)
            logger.info("ends: %s", self._why)
            return self._status

    def stop(self, status: int, why: str) -> None:
        """Stop serving; may be called by a signal handler."""
        if self._status is None:
            self._status, self._why = status, why
        self._waker.set()

    @contextlib.contextmanager
    def _handled_signals(self) -> Iterator[None]:
        def handle(number: int, _: object) -> None:
            self.stop(128 + number, signal.Signals(number).name)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._waker.set()

    def _receive(self) -> None:
        for routing_id, payload, public_key, host in self._door.receive():
            client = self._clients.names.get(public_key)
            if client is None:
                continue  # revoked
            try:
                self._handle(routing_id, decode_to_daemon(payload), client, public_key, host)
            except ProtocolError as error:
                logger.warning("%s at %s: %s", client, host, error)
                version = installed_versions().lingualinked
                self._give_up(
                    routing_id, f"it can't understand what it was sent ({error}); it has lingualinked {version}"
                )
            except Exception as error:  # costs this caller its worker, and nobody else anything
                logger.exception("%s at %s could not be served", client, host)
                self._give_up(routing_id, f"it failed ({error!r}): its log says more")

    def _give_up(self, routing_id: bytes, reason: str) -> None:
        """Refuse to go on with a caller."""
        self._send(routing_id, Refused(reason=reason))
        if routing_id in self._callers:
            self._dismiss(self._callers[routing_id], "was given up")

    def _handle(self, routing_id: bytes, message: ToDaemon, client: str, public_key: str, host: str) -> None:
        caller = self._callers.get(routing_id)
        if caller is not None and caller.public_key != public_key:
            return  # the connection of that name has just ended; a client may choose how its own is named
        if isinstance(message, Enter):
            if caller is None:
                check_texts(message.versions)
                self._let_in(Caller(routing_id, client, public_key, host), message.versions)
        elif caller is None or caller.is_ending:
            if isinstance(message, Leave):
                self._send(routing_id, Left())
        elif isinstance(message, StartWorker):
            self._start_worker(caller, message)
        elif isinstance(message, BootWorker):
            self._boot_worker(caller, message)
        elif isinstance(message, OpenRelay):
            self._open_relay(caller, message)
        else:
            self._dismiss(caller, "left", lambda: self._send(routing_id, Left()))

    def _let_in(self, caller: Caller, versions: Versions) -> None:
        own = installed_versions()
        reason = ""
        if versions.lingualinked != own.lingualinked:
            reason = (
                f"it has lingualinked {own.lingualinked}, and this process has {versions.lingualinked}: install the same version "
                "on both hosts"
            )
        elif self._served is not None:
            reason = f"it was started for one caller (--once), which is {self._served}: start one for each"
        if reason:
            logger.info("%s was refused: %s", caller, reason)
            self._send(caller.routing_id, Refused(reason=reason))
            return
        self._callers[caller.routing_id] = caller
        if self._options.serves_once:
            self._served = caller
        logger.info("%s came", caller)
        facts = collect_facts(self._options, self._shares.left_bytes)
        self._send(caller.routing_id, Entered(facts=facts))

    def _start_worker(self, caller: Caller, asked: StartWorker) -> None:
        if caller.device:
            raise ProtocolError("a connection has one worker at most")
        check_texts((asked.name, *asked.class_names))
        try:
            self._check_threads(asked.threads)
            memory_bytes = self._shares.lease(caller.routing_id, asked.memory_bytes)
            caller.limits = WorkerLeased(
                name=asked.name,
                memory_bytes=memory_bytes,
                threads=asked.threads or self._options.threads,
                accelerator=self._options.accelerator,
            )
            caller.start_worker(
                asked,
                lambda caller, key: self._post(lambda: self._report_key(caller, key)),
                lambda caller, how: self._post(lambda: self._report_end(caller, how)),
            )
        except (LingualinkedError, OSError) as error:
            logger.warning("%s gets no worker: %s", caller, error)
            self._send(caller.routing_id, Refused(reason=str(error)))
            self._dismiss(caller, "was refused a worker")
            return
        memory = "any memory" if memory_bytes is None else f"{bytes_text(memory_bytes)} of memory"
        threads = count_text(caller.limits.threads, "thread")
        logger.info("%s gets a worker for its device %r: %s, %s", caller, asked.name, threads, memory)
        self._send(caller.routing_id, caller.limits)

    def _check_threads(self, asked: int | None) -> None:
        allowed = self._options.threads
        if asked is not None and asked > allowed:
            raise ResourceError(
                f"threads={asked} are more than the {allowed} that it allows: state fewer, or start it with --threads {asked}"
            )

    def _boot_worker(self, caller: Caller, message: BootWorker) -> None:
        options, limits = self._options, caller.limits
        if limits is None or message.boot.name != limits.name:
            raise ProtocolError(f"there is no worker for a device {message.boot.name!r}")
        asked = message.boot.tcp
        advertise = options.advertise if asked is None or asked.advertise is None else asked.advertise
        caller.boot_worker(
            msgspec.structs.replace(
                message.boot,
                socket_folder=caller.socket_folder,
                starter_pid=os.getpid(),
                tcp=TcpEndpoint(host=options.bind.host, ports=options.ports, advertise=advertise),
                accelerator=limits.accelerator,
                threads=limits.threads,
                cpus=None,
                memory_bytes=limits.memory_bytes,
                weight_folders=WeightFolders(
                    models=options.models,
                    cache=options.cache,
                    cache_bytes=options.cache_bytes,
                    owner=caller.public_key,
                    verifies=options.verifies,
                    allows_code=options.allows_code,
                ),
            )
        )

    def _open_relay(self, caller: Caller, message: OpenRelay) -> None:
        options, port, reason = self._options, None, ""
        try:
            if not options.allows_relays:
                raise UnsupportedOperationError("it does not relay: start it with --relay")
            target = self._relay_target(message)
            endpoint = TcpEndpoint(host=options.bind.host, ports=options.ports, advertise=options.advertise)
            port = caller.open_relay(endpoint, target)
            logger.info("%s relays to %s", caller, target)
        except (LingualinkedError, ValueError) as error:
            reason = str(error)
            logger.warning("%s gets no relay to %r: %s", caller, message.host, reason)
        self._send(caller.routing_id, RelayOpened(number=message.number, port=port, reason=reason))

    def _relay_target(self, message: OpenRelay) -> Address:
        """Return where a relay leads: to a port of another host, never to what listens for this one alone."""
        host = ipaddress.ip_address(message.host)
        target = parse_address(str(Address(str(getattr(host, "ipv4_mapped", None) or host), message.port)), "target")
        if target.is_loopback and not self._options.bind.is_loopback:
            raise UnsupportedOperationError("it does not relay to what listens on its own host alone")
        return target

    def _report_key(self, caller: Caller, public_key: str) -> None:
        if not caller.is_ending:
            self._send(caller.routing_id, WorkerKeyMade(name=caller.device, public_key=public_key))

    def _report_end(self, caller: Caller, how: str) -> None:
        if not caller.is_ending:
            logger.info("the worker of %s for its device %r ended: %s", caller, caller.device, how.partition("\n")[0])
            self._send(caller.routing_id, WorkerEnded(name=caller.device, how=how))
            self._dismiss(caller, "has no worker any more")

    def _beat(self) -> None:
        if self._clients.refresh():
            self._door.admit(self._clients.names)
            logger.info("now lets in %s", ", ".join(sorted(self._clients.names.values())) or "nobody")
        for caller in list(self._callers.values()):
            if caller.public_key not in self._clients.names:
                self._send(caller.routing_id, Refused(reason="this client's key is not authorised any more"))
                self._dismiss(caller, "is not authorised any more")
            elif not self._send(caller.routing_id, Beat()):
                self._dismiss(caller, "can't be reached any more")

    def _check_wait(self, waited_s: float) -> None:
        wait_s = self._options.wait_s
        if wait_s is not None and self._served is None and waited_s >= wait_s:
            self.stop(NOBODY_CAME, f"nobody came within {wait_s:g} s")

    def _dismiss(self, caller: Caller, why: str, then: Callable[[], object] = lambda: None) -> None:
        """End a caller's lease: its worker, then the memory that it has leased."""
        if caller.is_ending:
            return
        caller.is_ending = True
        logger.info("%s %s", caller, why)

        def ended() -> None:
            self._shares.release(caller.routing_id)
            self._callers.pop(caller.routing_id, None)
            then()
            if self._served is caller:
                self.stop(0, f"{caller} was served")

        thread = caller.end_worker(lambda: self._post(ended))
        self._endings = {each for each in self._endings if each.is_alive()} | ({thread} if thread else set())

    def _end_all(self) -> None:
        for caller in list(self._callers.values()):
            self._dismiss(caller, "is left")
        deadline_s = time.monotonic() + _ENDING_S
        for thread in self._endings:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _send(self, routing_id: bytes, message: FromDaemon) -> bool:
        """Send a message; return whether the connection is still there."""
        return self._door.send(routing_id, encode(message))


@contextlib.contextmanager
def _logged_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception(what)

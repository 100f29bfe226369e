"""A caller's connection to one daemon: it gets a worker there, hears of its end, and says why anything failed.

Knows one socket and its monitor, on one thread; neither other daemons nor what the worker does.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import enum
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from lingualinked.address import Address
from lingualinked.cluster.remote.resolving import PROBE_S
from lingualinked.cluster.workers.remote_text import readable, readable_facts
from lingualinked.device import Device
from lingualinked.errors import ClosedError, DaemonError, ProtocolError
from lingualinked.protocol.boot import Boot
from lingualinked.protocol.daemon import (
    ANSWER_S,
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    MAX_FRAME_BYTES,
    Beat,
    BootWorker,
    Enter,
    Entered,
    FromDaemon,
    HostFacts,
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
    decode_from_daemon,
    encode,
)
from lingualinked.transport.keys.key_lists import wrong_server_key
from lingualinked.transport.keys.keys import KeyPair
from lingualinked.transport.sockets.handshakes import TIMEOUT_MS
from lingualinked.versions import installed_versions

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)
_MOST_FAILED_HANDSHAKES = 2  # libzmq would try for ever; the second one rules out a daemon that was just ending
_BURST, _PER_S = (
    1_000,
    20.0,
)  # messages since the connection was made: a daemon sends two beats a second, and a few others
_CUT_AFTER_S = 1.2  # without a beat: a daemon that ends by itself was heard more recently
_numbers = itertools.count()


class _Phase(enum.Enum):
    CONNECTING = "no connection came about"
    HANDSHAKE = "it accepted the connection and showed no key"
    ENTERING = "it did not answer"
    LEASING = "it did not say whether the worker may start"
    LEASED = ""
    CLOSED = "closed"


class NotConnectedError(Exception):
    """No connection came about; to find out why takes time, which others need not wait for."""

    def __init__(self, device: Device, address: Address) -> None:
        super().__init__(device.name)
        self.device = device
        self.address = address


class KnownDaemon(NamedTuple):
    """Where a daemon is, the public key that it must hold, and the keys with which this process enters."""

    address: Address  # numeric
    server_key: str
    keys: KeyPair


class Lease(NamedTuple):
    """What a daemon has granted to a device's worker, and what it says of its host."""

    limits: WorkerLeased
    facts: HostFacts
    address: Address  # of the daemon; numeric


class DaemonConnection:
    """One device's daemon, entered with a key of ours, for one worker.

    `leased` gets the `Lease`, or a `DaemonError` or `NotConnectedError`, by ``deadline_s`` (monotonic seconds), or a
    `ClosedError` if the connection is closed before. After that, `on_key` is told the public key of the worker, and `on_end`
    once how it has ended.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        device: Device,
        daemon: KnownDaemon,
        deadline_s: float,
        class_names: tuple[str, ...],
        leased: concurrent.futures.Future[Lease],
        on_key: Callable[[str, str], None],
        on_end: Callable[[str, str], None],
    ) -> None:
        self.name = device.name
        self.leased = leased
        self.left: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._device = device
        self._address = daemon.address
        self._keys = daemon.keys
        self._class_names = class_names
        self._on_key = on_key
        self._on_end = on_end
        self._phase = _Phase.CONNECTING
        self._num_failed_handshakes = 0
        self._entered: Entered | None = None
        self._has_key = False  # of the worker
        self._relays: dict[int, concurrent.futures.Future[int]] = {}  # asked for
        self._num_read = 0  # messages
        self._began_s = self._heard_s = time.monotonic()
        self._answer_by_s = deadline_s
        self._monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        try:
            self._open(daemon.server_key)
        except BaseException:
            self._close_sockets()
            raise

    def _open(self, server_key: str) -> None:
        socket = self._socket
        socket.linger = self._monitor.linger = 0
        socket.handshake_ivl = TIMEOUT_MS
        socket.maxmsgsize = MAX_FRAME_BYTES
        # Unlimited: a connection that ends while libzmq has stopped reading it aborts the process at its next heartbeat
        # (libzmq issues 3937 and 4767). `read` ends the connection to a daemon that sends too much instead.
        socket.rcvhwm = 0
        socket.ipv6 = ":" in self._address.host
        # The threads of libzmq send and expect them, so that the lease holds while this process computes.
        socket.heartbeat_ivl, socket.heartbeat_timeout = HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS
        socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
        socket.curve_serverkey = server_key.encode()
        socket.curve_publickey = self._keys.public.encode()
        socket.curve_secretkey = self._keys.secret.encode()
        endpoint = f"inproc://lingualinked.daemon-{next(_numbers)}"
        socket.monitor(endpoint, _EVENTS)
        self._monitor.connect(endpoint)
        socket.connect(str(self._address))
        self._send(Enter(versions=installed_versions()))  # it waits in libzmq until the handshake is done

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The sockets on which something may be said; none once closed."""
        return [] if self._phase is _Phase.CLOSED else [self._monitor, self._socket]

    def boot(self, boot: Boot) -> None:
        """Tell the worker who it is."""
        self._send(BootWorker(boot=boot))

    def open_relay(self, target: Address, opened: concurrent.futures.Future[int]) -> None:
        """Ask for a relay to an address; ``opened`` gets the port at which others reach it, or a DaemonError."""
        number = next(_numbers)
        self._relays[number] = opened
        self._send(OpenRelay(number=number, host=target.host, port=target.port))

    def leave(self) -> None:
        """End the worker; `left` is done once it has ended."""
        if self._phase in (_Phase.CONNECTING, _Phase.HANDSHAKE):
            self.close()
        else:
            self._send(Leave())

    def close(self) -> None:
        """Close the connection, which ends the worker soon; does nothing the second time."""
        if self._phase is not _Phase.CLOSED:
            self._phase = _Phase.CLOSED
            self._close_sockets()
            if not self.leased.done():
                self.leased.set_exception(ClosedError("the cluster is closed: make a new one"))
            for opened in self._relays.values():
                opened.set_exception(self._error("it ended before it had opened a relay"))
            self._relays.clear()
            if not self.leased.done():
                self.leased.set_exception(self._error("it ended before there was a worker"))
            self.left.set_result(None)

    def read(self) -> None:
        """Handle all that has been said and all that has happened to the connection."""
        events = []
        while self._phase is not _Phase.CLOSED and self._monitor.poll(0):
            events.append(parse_monitor_message(self._monitor.recv_multipart()))
        # Messages first: the last ones came before the end of the connection.
        while self._phase is not _Phase.CLOSED and self._socket.poll(0):
            payload = self._socket.recv()
            self._heard_s = time.monotonic()
            self._num_read += 1
            try:
                if self._num_read > _BURST + _PER_S * (self._heard_s - self._began_s):
                    raise ProtocolError("too many messages")
                self._handle(self._check_due(decode_from_daemon(payload)))
            except ProtocolError as error:
                self._fail(
                    f"it sent what can't be understood ({error}): install the same version of lingualinked on both hosts"
                )
        for event in events:
            if self._phase is not _Phase.CLOSED:
                self._handle_event(event["event"], event["value"])

    @property
    def deadline_s(self) -> float:
        """When `expire` is due (monotonic seconds); what keeps a connection from coming about takes time to find out."""
        return self._answer_by_s - (PROBE_S if self._phase is _Phase.CONNECTING else 0.0)

    def expire(self, now_s: float) -> None:
        """Fail unless the worker is leased in time."""
        if now_s >= self.deadline_s and self._phase not in (_Phase.LEASED, _Phase.CLOSED):
            if self._phase is _Phase.CONNECTING:
                self._fail_to_connect()
            else:
                self._fail_for_silence(self._phase, ANSWER_S)

    def _handle_event(self, event: int, value: int) -> None:
        match event:
            case zmq.EVENT_CONNECTED:
                if self._phase is _Phase.CONNECTING:
                    self._phase = _Phase.HANDSHAKE
            case zmq.EVENT_CONNECT_RETRIED:
                if self._phase is _Phase.CONNECTING:
                    self._fail_to_connect()
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._phase is _Phase.HANDSHAKE:
                    self._phase = _Phase.ENTERING
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                key = self._device.key or "default"
                self._fail(
                    f"it does not let in our key {key!r}: run `lingualinked keys authorize '{self._keys.public}'` there, or "
                    "name an authorised one as Device(key=...)"
                )
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._num_failed_handshakes += 1
                if value == zmq.EAGAIN:  # it took too long
                    self._fail_for_silence(_Phase.HANDSHAKE, TIMEOUT_MS / 1000)
                elif self._num_failed_handshakes == _MOST_FAILED_HANDSHAKES:
                    self._fail(wrong_server_key(self._device))
            case zmq.EVENT_DISCONNECTED:
                if self._phase is not _Phase.HANDSHAKE:
                    self._lose()

    def _check_due(self, message: FromDaemon) -> FromDaemon:
        """Return a message of the daemon, with texts that can be shown; raise ProtocolError if it is not due."""
        match message:
            case Entered():
                is_due = self._entered is None
                message = Entered(facts=readable_facts(message.facts))
            case WorkerLeased():
                is_due = self._entered is not None and not self.leased.done()
            case WorkerKeyMade():
                is_due = self.leased.done() and not self._has_key
                self._has_key = True
            case Refused() | RelayOpened():
                is_due = True
                message = msgspec.structs.replace(message, reason=readable(message.reason))
            case WorkerEnded():
                is_due = True
                message = msgspec.structs.replace(message, how=readable(message.how))
            case _:
                is_due = True
        if not is_due:
            raise ProtocolError(f"{type(message).__name__} is not due")
        return message

    def _handle(self, message: FromDaemon) -> None:
        match message:
            case Beat():
                pass
            case Entered():
                self._entered = message
                self._phase = _Phase.LEASING
                device = self._device
                self._send(
                    StartWorker(
                        name=device.name,
                        class_names=self._class_names,
                        memory_bytes=device.memory_bytes,
                        threads=device.threads,
                    )
                )
            case WorkerLeased():
                assert self._entered is not None
                self._phase = _Phase.LEASED
                self.leased.set_result(Lease(message, self._entered.facts, self._address))
            case Refused():
                self._fail(message.reason)
            case WorkerKeyMade():
                self._on_key(self.name, message.public_key)
            case WorkerEnded():
                if self.leased.done():
                    self._end(message.how)
                else:
                    self._fail(message.how)
            case RelayOpened():
                opened = self._relays.pop(message.number, None)
                if opened is not None and message.port is not None:
                    opened.set_result(message.port)
                elif opened is not None:
                    opened.set_exception(self._error(message.reason))
            case Left():
                self.close()

    def _lose(self) -> None:
        """Handle the end of the connection, which is not made anew: the daemon ends the worker."""
        silent_s = time.monotonic() - self._heard_s
        if silent_s > _CUT_AFTER_S:
            how = f"nothing was heard for {silent_s:.1f} s of its daemon at {self._device.address}: the network is cut, or the host is down"
        else:
            how = f"its daemon at {self._device.address} has ended"
        self._end(how)

    def _end(self, how: str) -> None:
        """Report how the worker has ended, or that there is none yet."""
        if self._phase is _Phase.LEASED:
            self._on_end(self.name, how)
            self.close()
        else:
            self._fail(how)

    def _error(self, cause: str) -> DaemonError:
        assert self._device.address is not None
        return DaemonError(self.name, self._device.address, cause)

    def _fail(self, cause: str) -> None:
        error = self._error(cause)
        if self._phase is _Phase.LEASED:
            self._end(str(error))
        else:
            self.leased.set_exception(error)
            self.close()

    def _fail_for_silence(self, phase: _Phase, waited_s: float) -> None:
        self._fail(
            f"{phase.value} within {waited_s:g} s: see that it is `lingualinked worker` that listens at port {self._address.port}, "
            "and that it is not stopped"
        )

    def _fail_to_connect(self) -> None:
        self.leased.set_exception(NotConnectedError(self._device, self._address))
        self.close()

    def _send(self, message: ToDaemon) -> None:
        if self._phase is not _Phase.CLOSED:
            with contextlib.suppress(zmq.Again):  # the connection has been refused already, of which the monitor tells
                self._socket.send(encode(message), zmq.DONTWAIT)

    def _close_sockets(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._socket.close()
        self._monitor.close()

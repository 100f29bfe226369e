"""The mailbox over ZeroMQ: one bound PULL socket, a PUSH socket for each peer, CURVE on all of them; and shared memory.

Knows no model and not what a payload means; `codec` defines the wire format, `zap` decides who may connect, and
`shared_ring` passes large tensors between processes of one machine.
"""

from __future__ import annotations

import math
import re
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zmq

from lingualinked.errors import ArgumentError
from lingualinked.public_key import raw_key
from lingualinked.quantities import count_text
from lingualinked.transport.keys.keys import KeyPair
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.memory.rings import Rings
from lingualinked.transport.sockets.sockets import Sockets
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint
from lingualinked.transport.wire.codec import (
    Limits,
    MalformedError,
    decode_message,
    encode_message,
)
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.transport.wire.message_limits import (
    DEFAULT_MAX_FRAME_BYTES,
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_NUM_FRAMES,
)
from lingualinked.transport.wire.refusals import Refusals
from lingualinked.transport.wire.tensor_descriptors import SpareTensor

if TYPE_CHECKING:
    from torch import Tensor

_CURVE_OVERHEAD_BYTES = 33  # of a frame that MAXMSGSIZE is compared with
# Anything else is refused: a transport that libzmq lacks would abort the process, and names would be looked up in the network.
_TCP_ADDRESS = re.compile(r"tcp://(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+(%[\w.-]+)?\]):\d{1,5}", re.ASCII)
_IPC_ADDRESS = re.compile(r"ipc://(/.+)/[0-9a-f]{8}")
_MAX_POLL_MS = 2**31 - 1


class ZmqMailbox(Mailbox):
    """A mailbox that processes reach over ipc, and over TCP from other machines.

    Everything on a socket is encrypted. Only holders of authorised keys can connect: others, and peers without
    encryption, fail in the handshake, before anything that they send is read. If the address is that of a unix socket,
    other users of the machine can't connect at all, since its folder is closed to them.

    With `shared_memory`, large tensors go through memory that the two processes share, if both run as the same user on
    one Linux machine and see each other's process numbers. It is not encrypted, and open only to those who may read the
    memory of these processes anyway. Otherwise, and as long as a peer has not opened this memory, they go over the socket.

    With `serves_gpu`, large tensors are received in pinned memory, from which a GPU copies them.

    It listens on a unix socket if `ipc` is true and libzmq supports it, in `socket_folder`, or else in a new folder that is
    removed when the mailbox is closed; and at the endpoint `tcp`, if given. With neither, it listens on a free port of
    127.0.0.1. While too many connections over TCP show no key, the kernel delays new ones. A connection over TCP that was
    cut is noticed within about a minute.

    Limits apply before encryption, and are the same for all parties. A frame that exceeds its limit is not read, and
    its sender loses the connection. A message is compared with its limit when it is received: until then it is in
    memory, as is everything that authorised peers send.
    """

    def __init__(
        self,
        name: str,
        keys: KeyPair,
        *,
        ipc: bool = True,
        tcp: TcpEndpoint | None = None,
        socket_folder: str | None = None,
        shared_memory: bool = True,
        serves_gpu: bool = False,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(name, keys.public, Refusals(name))
        self._limits = Limits(max_frame_bytes=max_frame_bytes, max_message_bytes=max_message_bytes)
        self._keys = keys
        self._socket_folder = socket_folder
        self._awaited: set[str] = set()  # peers whose connection `receive` returns for
        self.sent_shared_bytes = self.received_shared_bytes = 0  # of tensors, through shared memory
        self._sockets = Sockets(self._refusals)
        self._rings = Rings(is_used=shared_memory, is_pinned=serves_gpu)
        # The finalizer must not refer to the mailbox. Not at exit: the thread that owns the sockets may still run then.
        self._finalizer = weakref.finalize(self, _close, self._sockets, self._rings)
        self._finalizer.atexit = False
        weakref.finalize(self, self._sockets.remove_files)
        try:
            self._sockets.protect_inbox(keys, max_frame_bytes + _CURVE_OVERHEAD_BYTES)
            uses_ipc = ipc and zmq.has("ipc")
            self.addresses = (self._sockets.bind_ipc(socket_folder),) if uses_ipc else ()
            if tcp is not None or not uses_ipc:
                self.listen(tcp or TcpEndpoint())
        except BaseException:
            self.close()
            raise
        self._spare = SpareTensor()
        self._inbox = self._sockets.inbox
        self._waker = self._sockets.waker
        self._inbox_item: list[tuple[zmq.Socket[bytes] | int, int]] = [(self._inbox, zmq.POLLIN)]
        self._poll_items = [*self._inbox_item, (self._waker.fileno(), zmq.POLLIN)]

    def listen(self, endpoint: TcpEndpoint) -> str:  # noqa: D102
        self._check_open()
        address = self._sockets.bind_tcp(endpoint)
        self.addresses = (*self.addresses, address)
        return address

    def send(self, name: str, payload: bytes, tensors: Sequence[Tensor] = ()) -> int:  # noqa: D102
        self._check_peer(name)
        began_s = time.perf_counter()
        ring = self._rings.writers.get(name)
        num_before = 0 if ring is None else ring.num_written_bytes
        frames = encode_message(payload, tensors, self._limits, self._links.get(name), ring)
        self.encode_s = time.perf_counter() - began_s  # before what the socket wakes can take this core
        outbox = self._sockets.outboxes[name]
        try:
            # Copied, so that the caller may change the tensors. Measured: not copying gains nothing under CURVE.
            for frame in frames[:-1]:
                outbox.send(frame, zmq.DONTWAIT | zmq.SNDMORE)
            outbox.send(frames[-1], zmq.DONTWAIT)
        except zmq.Again:  # a refusal left the socket without a peer, or the peer has long received nothing
            raise self._refusal_error(name) from None
        except BaseException:
            # Interrupted, perhaps within a message: its first frames must not become the beginning of the next one.
            self._disconnect(name)
            self._connect(name, *self._peers[name])
            raise
        num_shared_bytes = 0 if ring is None else ring.num_written_bytes - num_before
        self.sent_shared_bytes += num_shared_bytes
        return sum(map(len, frames)) + num_shared_bytes

    def receive(self, timeout_s: float | None) -> Delivery | None:  # noqa: D102
        self._check_open()
        if self._has_awaited_connection():  # of which `is_connected` has learnt when it was asked for another one
            return None
        if timeout_s == 0 and not self._sockets.connecting and not self._delayed:  # most often, nothing has come
            has_come = not self._waker.clear() and zmq.zmq_poll(self._inbox_item, 0)
            return self._receive_one() if has_come else None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            # 1) wait for a message, a wake-up, the next delayed message or the deadline
            left_s = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
            wait_ms = min(left_s * 1000, _MAX_POLL_MS)
            due_ms = self._delayed.next_due_in_s * 1000
            # Rounded down for a delayed message: pop_due() sleeps for the rest.
            items = self._poll_items
            if self._sockets.connecting:
                items = [*items, *((each.events, zmq.POLLIN) for each in self._sockets.connecting.values())]
            self._spare.prepare()
            ready = zmq.zmq_poll(items, max(int(due_ms), 0) if due_ms < wait_ms else math.ceil(wait_ms))
            # 2) a wake-up comes first, then a delayed message that is due, then a new one
            if self._waker.clear() or self._has_awaited_connection():
                return None
            delivery = self._receive_one() if ready and self._delayed.next_due_in_s > 0 else self._delayed.pop_due()
            # 3) without a message, wait again until the deadline
            is_over = not ready or left_s <= 0  # refused messages may keep coming
            if delivery is not None or (is_over and left_s * 1000 <= min(_MAX_POLL_MS, due_ms)):
                return delivery

    def is_connected(self, name: str) -> bool:  # noqa: D102
        self._check_peer(name)
        self._sockets.read_events()
        if name not in self._sockets.connecting:
            self._awaited.discard(name)
            return True
        self._awaited.add(name)
        return False

    def explain_unconnected(self, name: str) -> str:  # noqa: D102
        self._check_peer(name)
        monitor = self._sockets.connecting.get(name)
        return "" if monitor is None else monitor.explain(self._peers[name][0])

    def _has_awaited_connection(self) -> bool:
        if not self._sockets.connecting and not self._awaited:
            return False
        self._sockets.read_events()
        connected = self._awaited - self._sockets.connecting.keys()
        self._awaited -= connected
        return bool(connected)

    def wake(self) -> None:  # noqa: D102
        self._waker.set()

    def close(self) -> None:  # noqa: D102
        self._closed = True
        self._peers.clear()
        self._finalizer()

    def _authorise(self, public_key: str) -> None:
        self._sockets.authorise(public_key)

    def _withdraw(self, public_key: str) -> None:
        self._sockets.withdraw(public_key)
        self._rings.close_readers(public_key)

    def _connect(self, name: str, address: str, public_key: str) -> None:
        raw_key(public_key)
        if not self._is_reachable(address):
            raise ArgumentError(
                f"mailbox {self.name!r} does not connect to {name!r} at {address!r}: pass the address of its mailbox, tcp:// and "
                f"numbers, or ipc:// and a socket in {self._socket_folder or 'a folder of sockets'}"
            )
        try:
            self._sockets.connect(name, address, public_key, self._keys)
        except zmq.ZMQError as error:
            raise ArgumentError(
                f"mailbox {self.name!r} can't connect to {name!r} at {address!r} ({error}): pass the address of its mailbox"
            ) from error
        if public_key not in self._elsewhere:
            self._rings.add_writer(name)

    def _is_reachable(self, address: str) -> bool:
        """Return whether an address is a valid one, and in the given folder if it is that of a unix socket."""
        of_ipc = _IPC_ADDRESS.fullmatch(address)
        if of_ipc is None:
            return _TCP_ADDRESS.fullmatch(address) is not None
        return self._socket_folder in (None, of_ipc[1])

    def _disconnect(self, name: str) -> None:
        self._awaited.discard(name)
        self._sockets.disconnect(name)
        self._rings.close_writer(name)

    def _receive_one(self) -> Delivery | None:
        """Receive one message; return None if none is there, or if it was refused or is not due yet."""
        began_s = time.perf_counter()
        try:
            frames, num_bytes, num_frames = self._read_frames()
        except zmq.Again:
            return None
        except BaseException:  # interrupted: the rest of this message must not become the beginning of the next one
            while self._inbox.get(zmq.RCVMORE):
                self._inbox.recv(zmq.DONTWAIT)
            raise
        key = str(frames[0].get("User-Id"))
        sender = self._authorised.get(key)
        if sender is None:  # connected while it was authorised
            self._refuse_key("a message", key)
            return None
        try:
            if num_frames > len(frames):
                raise MalformedError(
                    "size", f"a message of {count_text(num_bytes, 'byte')} in {count_text(num_frames, 'frame')}"
                )
            message = decode_message(
                [frame.buffer for frame in frames], self._limits, self._rings.readers.get(key), self._spare
            )
        except MalformedError as error:
            self._refusals.add(sender, error.kind, error.detail)
            return None
        except Exception as error:  # noqa: BLE001 - no memory for its tensors, say: only this message is lost
            self._refusals.add(sender, "unreadable", f"{type(error).__name__}: {error}")
            return None
        num_bytes += message.shared_bytes
        self.received_shared_bytes += message.shared_bytes
        if message.offer is not None and key not in self._elsewhere:
            self._rings.open_reader(key, message.offer)
        decode_s = time.perf_counter() - began_s
        return self._hold_until_due(
            Delivery(
                sender, message.payload, message.tensors, num_bytes, decode_s, same_host=key not in self._elsewhere
            ),
            message.due_us,
        )

    def _read_frames(self) -> tuple[list[zmq.Frame], int, int]:
        """Read a message; return its frames within the limits, and the bytes and the number of all its frames."""
        frames: list[zmq.Frame] = []
        num_bytes = num_frames = 0
        more = True
        while more:
            frame = self._inbox.recv(zmq.DONTWAIT, copy=False)
            more = frame.more
            num_bytes += len(frame)
            num_frames += 1
            if not frames or (num_frames <= MAX_NUM_FRAMES and num_bytes <= self._limits.max_message_bytes):
                frames.append(frame)
        return frames, num_bytes, num_frames


def _close(sockets: Sockets, rings: Rings) -> None:
    sockets.close()
    rings.close()

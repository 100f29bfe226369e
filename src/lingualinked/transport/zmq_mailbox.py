"""The mailbox over ZeroMQ: one bound PULL socket, a PUSH socket for each peer, CURVE on all of them.

Knows no model and not what a payload means; what a message looks like is `codec`'s, who may connect `zap`'s.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import zmq

from lingualinked.errors import ArgumentError
from lingualinked.quantities import count_text
from lingualinked.transport.codec import (
    DEFAULT_MAX_FRAME_BYTES,
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_NUM_FRAMES,
    Limits,
    MalformedError,
    decode_message,
    encode_message,
)
from lingualinked.transport.delivery import Delivery
from lingualinked.transport.handshakes import TIMEOUT_MS
from lingualinked.transport.keys import KeyPair, authorise, check_authorised, raw_key
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.refusals import Refusals
from lingualinked.transport.socket_folder import make_socket_folder, new_socket_path
from lingualinked.transport.waker import Waker
from lingualinked.transport.zap import DOMAIN, ZapHandler

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("lingualinked.transport")

_LOOPBACK = "tcp://127.0.0.1:*"
_CURVE_OVERHEAD_BYTES = 33  # of a frame that MAXMSGSIZE is compared with
_CLOSE_TIMEOUT_S = 5.0
_MAX_UNTAKEN = 1_000  # messages of one peer that lie here; what is more stays with the peer
_MAX_UNSENT = 100_000  # messages to one peer; far more than are ever on their way to one that takes them
# Other transports of libzmq end the process where they are missing, and names are looked up in the network.
_TCP_ADDRESS = re.compile(r"tcp://(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+\]):\d{1,5}")
_IPC_ADDRESS = re.compile(r"ipc://(/.+)/[0-9a-f]{8}")
_LONGEST_POLL_MS = 2**31 - 1


class ZmqMailbox(Mailbox):
    """A mailbox that processes of one machine reach over ipc or loopback.

    Everything is encrypted. Only holders of authorised keys can connect: others, and peers without encryption, fail
    in the handshake, before anything that they send is read. Other users of the machine can't even connect where the
    address is that of a unix socket, whose folder is closed to them.

    Parameters
    ----------
    name : str
        The party's own name, for messages.
    keys : KeyPair
        Its keys; others connect with the public half.
    authorised : mapping of str to str
        Public key and name of each party that may connect, to begin with. A refusal is final: whoever connects must have
        been authorised, here or by `authorise`, before.
    address : {"ipc", "tcp"}, optional
        What to listen on: a unix socket, or a free port of 127.0.0.1. By default the first where there are any.
    socket_folder : str, optional
        The folder in which its unix socket lies; by default one of its own, which goes when the mailbox is closed.
    max_frame_bytes, max_message_bytes : int
        Limits of a message that is sent or received, before encryption; the same for all parties that talk. A frame
        beyond its limit costs the sender the connection before it is read. A message is compared with its limit when it
        is taken: until then it lies in memory, as everything does that authorised peers send.

    Raises
    ------
    ArgumentError
        If a key, a limit or the kind of address can't be used, or two keys are authorised under one name.
    ResourceError
        If there is no folder for its socket.
    """

    def __init__(
        self,
        name: str,
        keys: KeyPair,
        authorised: Mapping[str, str],
        address: Literal["ipc", "tcp"] | None = None,
        *,
        socket_folder: str | None = None,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(name, keys.public, Refusals(name))
        self._limits = Limits(max_frame_bytes=max_frame_bytes, max_message_bytes=max_message_bytes)
        self._keys = keys
        self._socket_folder = socket_folder
        self._authorised = check_authorised(authorised)
        kind = _kind_of_address(address)
        self._sockets = _Sockets(self._authorised, self._refusals)
        # What the finalizer holds must not lead back here. At exit the thread that owns the sockets may still run.
        self._finalizer = weakref.finalize(self, self._sockets.close)
        self._finalizer.atexit = False
        weakref.finalize(self, self._sockets.remove_files)
        try:
            endpoint = _LOOPBACK if kind == "tcp" else self._sockets.new_endpoint(socket_folder)
            self.address = self._sockets.bind(endpoint, keys, max_frame_bytes + _CURVE_OVERHEAD_BYTES)
        except BaseException:
            self.close()
            raise
        self._inbox = self._sockets.inbox
        self._waker = self._sockets.waker
        self._poll_items: list[tuple[zmq.Socket[bytes] | int, int]] = [
            (self._inbox, zmq.POLLIN),
            (self._waker.fileno(), zmq.POLLIN),
        ]

    def send(self, name: str, payload: bytes, tensors: Sequence[Tensor] = ()) -> int:  # noqa: D102
        self._check_peer(name)
        began_s = time.perf_counter()
        frames = encode_message(payload, tensors, self._limits, self._links.get(name))
        outbox = self._sockets.outboxes[name]
        try:
            # Copied: measured, not copying gains nothing under CURVE. And the tensors stay the caller's to change.
            for frame in frames[:-1]:
                outbox.send(frame, zmq.DONTWAIT | zmq.SNDMORE)
            outbox.send(frames[-1], zmq.DONTWAIT)
        except zmq.Again:  # a refusal has left the socket without a peer, or nothing has been taken for very long
            raise self._refused_by(name) from None
        except BaseException:
            # Interrupted, perhaps within a message: its first half must not become the beginning of the next one.
            self._disconnect(name)
            self._connect(name, *self._peers[name])
            raise
        self.encode_s = time.perf_counter() - began_s
        return sum(map(len, frames))

    def receive(self, timeout_s: float | None) -> Delivery | None:  # noqa: D102
        self._check_open()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
            wait_ms = min(left_s * 1000, _LONGEST_POLL_MS)
            held_ms = self._held.left_s * 1000
            # Rounded down for what is held, which is slept for at the end.
            ready = zmq.zmq_poll(self._poll_items, max(int(held_ms), 0) if held_ms < wait_ms else math.ceil(wait_ms))
            if self._waker.clear():
                return None
            delivery = self._take() if ready and self._held.left_s > 0 else self._held.take()
            is_over = not ready or left_s <= 0  # what is refused may never end
            if delivery is not None or (is_over and left_s * 1000 <= min(_LONGEST_POLL_MS, held_ms)):
                return delivery

    def wake(self) -> None:  # noqa: D102
        self._waker.set()

    def close(self) -> None:  # noqa: D102
        self._closed = True
        self._peers.clear()
        self._finalizer()

    def _authorise(self, name: str, public_key: str) -> None:
        before = authorise(self._authorised, name, public_key)
        self._sockets.authorise(public_key)
        if before is not None:
            self._sockets.withdraw(before)

    def _withdraw(self, public_key: str) -> None:
        self._sockets.withdraw(public_key)

    def _connect(self, name: str, address: str, public_key: str) -> None:
        raw_key(public_key)
        if not self._may_reach(address):
            raise ArgumentError(
                f"mailbox {self.name!r} does not connect to {name!r} at {address!r}: pass its mailbox's address, tcp:// and "
                f"numbers, or ipc:// and a socket in {self._socket_folder or 'a folder of sockets'}"
            )
        try:
            self._sockets.connect(name, address, public_key, self._keys)
        except zmq.ZMQError as error:
            raise ArgumentError(
                f"mailbox {self.name!r} can't connect to {name!r} at {address!r} ({error}): pass its mailbox's address"
            ) from error

    def _may_reach(self, address: str) -> bool:
        """Whether an address is one of a mailbox, and of a unix socket in the same folder if that is given."""
        of_ipc = _IPC_ADDRESS.fullmatch(address)
        if of_ipc is None:
            return _TCP_ADDRESS.fullmatch(address) is not None
        return self._socket_folder in (None, of_ipc[1])

    def _disconnect(self, name: str) -> None:
        self._sockets.disconnect(name)

    def _take(self) -> Delivery | None:
        """Take one message; None if there is none after all, or it was refused."""
        began_s = time.perf_counter()
        try:
            frames, num_bytes, num_frames = self._read()
        except zmq.Again:
            return None
        except BaseException:  # interrupted: what is left of this message must not become the beginning of the next one
            while self._inbox.get(zmq.RCVMORE):
                self._inbox.recv(zmq.DONTWAIT)
            raise
        key = str(frames[0].get("User-Id"))
        sender = self._authorised.get(key)
        if sender is None:  # connected while it was
            self._refuse_key("a message", key)
            return None
        try:
            if num_frames > len(frames):
                raise MalformedError(
                    "size", f"a message of {count_text(num_bytes, 'byte')} in {count_text(num_frames, 'frame')}"
                )
            message = decode_message([frame.buffer for frame in frames], self._limits)
        except MalformedError as error:
            self._refusals.add(sender, error.kind, error.detail)
            return None
        except Exception as error:  # noqa: BLE001 - memory for its tensors, say: it costs that message alone
            self._refusals.add(sender, "unreadable", f"{type(error).__name__}: {error}")
            return None
        decode_s = time.perf_counter() - began_s
        return self._arrive(Delivery(sender, message.payload, message.tensors, num_bytes, decode_s), message.due_us)

    def _read(self) -> tuple[list[zmq.Frame], int, int]:
        """Read all frames of a message, and keep as many as may belong to one; return them, and what was read."""
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


class _Sockets:
    """What has to be closed: apart from the mailbox, so that a finalizer of the mailbox can do it."""

    def __init__(self, authorised: Mapping[str, str], refusals: Refusals) -> None:
        self._pid = os.getpid()
        self.outboxes: dict[str, zmq.Socket[bytes]] = {}
        self._files = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self.waker = Waker()
            undo.callback(self.waker.close)
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            # Frames carry the key as user id, not the name: libzmq ends a user id at the first zero byte.
            self._zap = ZapHandler(self._context, {raw_key(key): key for key in authorised}, refusals)
            undo.callback(self._zap.stop, _CLOSE_TIMEOUT_S)
            self.inbox = self._socket(zmq.PULL)
            undo.callback(self.inbox.close)
            self._zap.watch(self.inbox)
            undo.pop_all()

    def new_endpoint(self, folder: str | None) -> str:
        """Choose a name for a unix socket in a folder, or in a new one; what is made goes when all is closed."""
        if folder is None:
            folder = make_socket_folder()
            self._files.callback(shutil.rmtree, folder, ignore_errors=True)
        path = new_socket_path(folder)
        self._files.callback(Path(path).unlink, missing_ok=True)
        return f"ipc://{path}"

    def bind(self, endpoint: str, keys: KeyPair, max_frame_bytes: int) -> str:
        self.inbox.curve_server = True
        self.inbox.curve_publickey = keys.public.encode()
        self.inbox.curve_secretkey = keys.secret.encode()
        self.inbox.zap_domain = DOMAIN
        self.inbox.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self.inbox.maxmsgsize = max_frame_bytes
        self.inbox.rcvhwm = _MAX_UNTAKEN
        self.inbox.bind(endpoint)
        bound = self.inbox.get(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return bound.decode().rstrip("\0")

    def authorise(self, public_key: str) -> None:
        self._zap.authorise(raw_key(public_key), public_key)

    def withdraw(self, public_key: str) -> None:
        self._zap.withdraw(raw_key(public_key))

    def connect(self, name: str, address: str, public_key: str, keys: KeyPair) -> None:
        outbox = self._socket(zmq.PUSH)
        outbox.sndhwm = _MAX_UNSENT
        try:
            outbox.curve_serverkey = public_key.encode()
            outbox.curve_publickey = keys.public.encode()
            outbox.curve_secretkey = keys.secret.encode()
            outbox.connect(address)
        except BaseException:
            outbox.close()
            raise
        self.outboxes[name] = outbox

    def disconnect(self, name: str) -> None:
        self.outboxes.pop(name).close()

    def close(self) -> None:
        if os.getpid() != self._pid:  # a forked child holds copies: they must not end what is the parent's
            return
        self.waker.close()
        self.inbox.close()
        while self.outboxes:
            self.outboxes.popitem()[1].close()
        self.remove_files()
        if not self._zap.stop(_CLOSE_TIMEOUT_S):
            logger.warning("a ZeroMQ context did not end within %s s; its threads stay", _CLOSE_TIMEOUT_S)

    def remove_files(self) -> None:
        """Remove the name of its unix socket, and the folder if that is its own."""
        if os.getpid() == self._pid:
            self._files.close()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        socket.handshake_ivl = TIMEOUT_MS
        return socket


def _kind_of_address(address: str | None) -> str:
    kinds = ["ipc", "tcp"] if zmq.has("ipc") else ["tcp"]
    if address is None:
        return kinds[0]
    if address not in kinds:
        raise ArgumentError(f"address={address!r} can't be used on {sys.platform}: pass {' or '.join(kinds)}, or None")
    return address

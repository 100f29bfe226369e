"""The cluster's own I/O thread: sends what other threads hand it, and completes their futures.

Knows messages and deadlines; neither processes nor what a step means.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import (
    CheckpointError,
    ClosedError,
    DeviceMemoryError,
    LingualinkedError,
    ProtocolError,
    StepTimeoutError,
    UnsupportedOperationError,
    WorkerDiedError,
    WorkerError,
)
from lingualinked.protocol.messages import (
    AnyMessage,
    CallerMessage,
    FailureKind,
    Hello,
    LoadProgress,
    LogRecord,
    ModelUnloaded,
    RequestFailed,
    StageLoaded,
    Step,
    StepDone,
    StepFailed,
    WorkerMessage,
    WorkerReport,
    decode,
    encode,
)
from lingualinked.transport.keys import KeyPair
from lingualinked.transport.mailbox import Delivery, Mailbox
from lingualinked.transport.zmq_mailbox import ZmqMailbox

logger = logging.getLogger("lingualinked.cluster")

_STOP_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class StepReply:
    """The last stage's answer to a step.

    Parameters
    ----------
    tensors : tuple of Tensor
        The logits.
    timings_us : tuple of int
        Microseconds of compute in each stage.
    """

    tensors: tuple[Tensor, ...]
    timings_us: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class _Pending:
    future: concurrent.futures.Future[object]
    devices: frozenset[str]
    timeout_s: float
    deadline: float
    what: str
    on_progress: Callable[[int], None] | None = None


class Engine:
    """Everything that one cluster sends and receives, on one thread.

    Parameters
    ----------
    keys : KeyPair
        The caller's CURVE keys.
    public_keys : mapping of str to str
        Public key of each device's worker, by device name.
    max_frame_bytes : int
        Largest frame that it sends or takes.
    """

    def __init__(self, keys: KeyPair, public_keys: Mapping[str, str], max_frame_bytes: int) -> None:
        self._keys = keys
        self._public_keys = dict(public_keys)
        self._max_frame_bytes = max_frame_bytes
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._requests = itertools.count()
        self._pending: dict[tuple[str, int, int], _Pending] = {}
        self._hellos: dict[str, concurrent.futures.Future[Hello]] = {
            name: concurrent.futures.Future() for name in public_keys
        }
        self._addresses: dict[str, str] = {}
        self._ended: dict[str, str] = {}
        self._stopping = False
        self._mailbox: Mailbox
        ready: concurrent.futures.Future[Mailbox] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="lingualinked-io", daemon=True)
        self._thread.start()
        self._mailbox = ready.result(_STOP_S * 5)

    @property
    def address(self) -> str:
        """Where the caller's inbox listens."""
        return self._mailbox.address

    def wait_for_worker(self, name: str, timeout_s: float) -> None:
        """Wait until a worker is ready.

        Raises
        ------
        WorkerDiedError
            If it ended before.
        StepTimeoutError
            If it was not ready in time.
        ClosedError
            If the cluster was closed meanwhile.
        """
        try:
            self._hellos[name].result(timeout_s)
        except TimeoutError as error:
            raise StepTimeoutError(
                f"the worker on device {name!r} was not ready within {timeout_s:g} s: raise timeout_s on a busy machine"
            ) from error

    def peer(self, name: str) -> tuple[str, str]:
        """Address and public key of a worker that is ready, or of the caller."""
        if name == CALLER:
            return self.address, self._keys.public
        return self._addresses[name], self._public_keys[name]

    def request(
        self,
        device: str,
        build: Callable[[int], CallerMessage],
        what: str,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> concurrent.futures.Future[object]:
        """Ask one worker for something.

        Parameters
        ----------
        device : str
            The worker's device.
        build : callable
            Makes the message from a request number.
        what : str
            What is asked, for the time-out's message.
        timeout_s : float
            Seconds until the future fails; each progress report starts them anew.
        on_progress : callable or None
            Told the bytes loaded so far, on the I/O thread.

        Returns
        -------
        Future
            Of the worker's answer; fails with the library's errors.
        """
        number = next(self._requests)
        pending = self._new_pending(frozenset([device]), timeout_s, f"{what} on device {device!r}", on_progress)
        self._post(lambda: self._send(device, build(number), (), ("request", number, 0), pending))
        return pending.future

    def step(
        self, devices: Sequence[str], step: Step, tensors: tuple[Tensor, ...], timeout_s: float
    ) -> concurrent.futures.Future[object]:
        """Send a step to the first stage; the future gives the last stage's `StepReply`.

        Parameters
        ----------
        devices : sequence of str
            Devices of all stages, in pipeline order.
        step : Step
            The step.
        tensors : tuple of Tensor
            What travels beside it.
        timeout_s : float
            Seconds until the future fails.
        """
        what = f"a step through devices {', '.join(map(repr, devices))}"
        pending = self._new_pending(frozenset(devices), timeout_s, what)
        self._post(lambda: self._send(devices[0], step, tensors, ("step", step.session, step.number), pending))
        return pending.future

    def tell(self, device: str, message: CallerMessage) -> None:
        """Send a message that has no answer; does nothing once the engine is stopped or in a forked child."""
        with contextlib.suppress(ClosedError, UnsupportedOperationError):
            self._post(lambda: self._send(device, message, (), None, None))

    def worker_ended(self, device: str, how: str) -> None:
        """Take note that a worker process has ended: whatever needs it fails."""
        with contextlib.suppress(ClosedError):
            self._post(lambda: self._bury(device, how))

    def stop(self) -> None:
        """End the I/O thread; whatever is pending fails with `ClosedError`."""
        with self._lock:
            self._stopping = True
        self._mailbox.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_S)

    # --- below here: on the I/O thread

    def _run(self, ready: concurrent.futures.Future[Mailbox]) -> None:
        try:
            names = {key: name for name, key in self._public_keys.items()}
            mailbox = ZmqMailbox(CALLER, self._keys, names, max_frame_bytes=self._max_frame_bytes)
        except BaseException as error:
            ready.set_exception(error)
            return
        self._mailbox = mailbox
        ready.set_result(mailbox)
        try:
            while not self._stopping:
                while self._commands:
                    self._commands.popleft()()
                delivery = mailbox.receive(self._time_left())
                if delivery is not None:
                    self._take(delivery)
                self._expire()
        except BaseException:
            logger.exception("the I/O thread failed")
            raise
        finally:
            with self._lock:  # nothing is posted after this
                self._stopping = True
            self._fail_all(ClosedError("the cluster was closed"))
            mailbox.close()

    def _take(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.payload)
            if not isinstance(message, WorkerMessage):
                raise ProtocolError(f"{type(message).__name__} is not for the caller")
            self._handle(message, delivery)
        except ProtocolError as error:
            logger.warning("refused a message from %r: %s", delivery.sender, error)

    def _handle(self, message: WorkerMessage, delivery: Delivery) -> None:
        sender = delivery.sender
        match message:
            case StepDone():
                reply = StepReply(delivery.tensors, message.timings_us)
                self._complete(("step", message.session, message.number), reply)
            case StepFailed():
                self._fail(("step", message.session, message.number), _remote_error(sender, message))
            case StageLoaded() | ModelUnloaded() | WorkerReport():
                self._complete(("request", message.request, 0), message)
            case RequestFailed():
                self._fail(("request", message.request, 0), _remote_error(sender, message))
            case LoadProgress():
                pending = self._pending.get(("request", message.request, 0))
                if pending is not None and pending.on_progress is not None:
                    pending.deadline = time.monotonic() + pending.timeout_s
                    pending.on_progress(message.num_bytes)
            case Hello():
                self._addresses[sender] = message.address
                self._mailbox.connect(sender, message.address, self._public_keys[sender])
                if not self._hellos[sender].done():
                    self._hellos[sender].set_result(message)
            case LogRecord():
                logging.getLogger(message.logger if message.logger.startswith("lingualinked") else "lingualinked.worker").log(
                    message.level, "[%s] %s", sender, message.text, extra={"device": sender}
                )

    def _send(
        self,
        device: str,
        message: AnyMessage,
        tensors: tuple[Tensor, ...],
        key: tuple[str, int, int] | None,
        pending: _Pending | None,
    ) -> None:
        try:
            if device in self._ended:
                raise WorkerDiedError(device, self._ended[device])
            if pending is not None:
                for name in pending.devices & self._ended.keys():
                    raise WorkerDiedError(name, self._ended[name])
            self._mailbox.send(device, encode(message), tensors)
        except Exception as error:
            if pending is not None:
                pending.future.set_exception(error)
            return
        if key is not None and pending is not None:
            self._pending[key] = pending

    def _complete(self, key: tuple[str, int, int], result: object) -> None:
        pending = self._pending.pop(key, None)
        if pending is not None:
            pending.future.set_result(result)

    def _fail(self, key: tuple[str, int, int], error: Exception) -> None:
        pending = self._pending.pop(key, None)
        if pending is not None:
            pending.future.set_exception(error)

    def _bury(self, device: str, how: str) -> None:
        self._ended[device] = how
        hello = self._hellos[device]
        if not hello.done():
            hello.set_exception(WorkerDiedError(device, how))
        for key in [key for key, pending in self._pending.items() if device in pending.devices]:
            self._fail(key, WorkerDiedError(device, how))

    def _expire(self) -> None:
        now = time.monotonic()
        for key in [key for key, pending in self._pending.items() if pending.deadline <= now]:
            self._fail(key, StepTimeoutError(f"{self._pending[key].what} got no answer in the time allowed (timeout_s)"))

    def _time_left(self) -> float | None:
        if self._commands:
            return 0.0
        if not self._pending:
            return None
        return max(0.0, min(pending.deadline for pending in self._pending.values()) - time.monotonic())

    def _fail_all(self, error: LingualinkedError) -> None:
        while self._commands:
            self._commands.popleft()()  # sends to closed ears; their futures are then pending
        for key in list(self._pending):
            self._fail(key, error)
        for hello in self._hellos.values():
            if not hello.done():
                hello.set_exception(error)

    # --- on any thread

    def _new_pending(
        self,
        devices: frozenset[str],
        timeout_s: float,
        what: str,
        on_progress: Callable[[int], None] | None = None,
    ) -> _Pending:
        return _Pending(concurrent.futures.Future(), devices, timeout_s, time.monotonic() + timeout_s, what, on_progress)

    def _post(self, command: Callable[[], None]) -> None:
        if os.getpid() != self._owner_pid:
            raise UnsupportedOperationError(
                "a cluster can't be used in a forked child of the process that made it: make one there, or use threads"
            )
        with self._lock:
            if self._stopping:
                raise ClosedError("the cluster is closed: make a new one")
            self._commands.append(command)
        self._mailbox.wake()


def _remote_error(device: str, message: RequestFailed | StepFailed) -> Exception:
    if message.kind is FailureKind.MEMORY:
        return DeviceMemoryError(device, message.cause, message.traceback)
    if message.kind is FailureKind.CHECKPOINT:
        return CheckpointError(f"device {device!r}: {message.cause.partition(': ')[2]}")
    return WorkerError(device, message.cause, message.traceback)

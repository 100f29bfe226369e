"""Everything that a cluster sends for other threads: requests and steps, whose futures it completes, and commands.

Knows which answer is due to which message; neither processes nor what a step means.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from lingualinked.cluster.messaging.exchange import closed
from lingualinked.cluster.messaging.failures import renewed
from lingualinked.cluster.messaging.io_thread import START_S, IOThread
from lingualinked.cluster.messaging.pending import Pending, settle
from lingualinked.cluster.messaging.reach import RemoteHost
from lingualinked.cluster.steps.step_reply import RunStart
from lingualinked.cluster.weights.file_sharing import SharedLoad
from lingualinked.device import CALLER, Link
from lingualinked.environment import Environment
from lingualinked.errors import ClosedError, StepTimeoutError, UnsupportedOperationError, WorkerDiedError
from lingualinked.interrupts import wait_in_pieces
from lingualinked.model.process.environment_probe import read_environment
from lingualinked.protocol.adapting import AddAdapter, RemoveAdapter
from lingualinked.protocol.editing import EditTensor
from lingualinked.protocol.gradients import AbandonBackward, FreeGraph, ResumeBackward, RunBackward
from lingualinked.protocol.hooking import HookAnswered
from lingualinked.protocol.messages import CutLinks, EmulateDevice, LoadStage, Request, check
from lingualinked.protocol.moving import AnnounceMove, CopyKV, ForkSession, JoinSessions, KeepPlan, MoveSession
from lingualinked.protocol.packed import PackedStep
from lingualinked.protocol.reading import ReadTensor
from lingualinked.protocol.roles import ANSWERS
from lingualinked.protocol.running import BeginRun, EndRun
from lingualinked.protocol.steps import EndSession, Step

_Command = EndSession | MoveSession | KeepPlan | HookAnswered | AbandonBackward | FreeGraph | EndRun
_OF_A_MODEL = (
    LoadStage
    | AnnounceMove
    | CopyKV
    | ForkSession
    | JoinSessions
    | ReadTensor
    | EditTensor
    | RunBackward
    | ResumeBackward
    | AddAdapter
    | RemoveAdapter
)


@functools.cache
def _own_environment() -> Environment:
    return read_environment()


class Engine(IOThread):
    """Everything that one cluster sends and receives, on one thread."""

    def __init__(
        self,
        devices: Iterable[str],
        socket_folder: str | None,
        max_frame_bytes: int,
        shared_memory: bool,
        advertise: str | None,
    ) -> None:
        self.trusted: frozenset[str] = frozenset()  # devices; the cluster says which
        self.fetching: frozenset[str] = frozenset()  # devices that can't read this process's files, likewise
        self._requests = itertools.count()
        super().__init__(devices, socket_folder, max_frame_bytes, shared_memory, advertise)

    def expect_worker(self, device: str) -> None:
        """Prepare for the worker of a device that is added."""
        self._call(lambda: self._exchange.expect_worker(device))

    def use_relays(
        self, relay: Callable[[str, str], str | None], open_relay: Callable[[str, str], concurrent.futures.Future[str]]
    ) -> None:
        """Lead messages of pairs for which ``relay`` names a device through that one, where ``open_relay`` opens a way."""

        def open_here(hub: str, address: str) -> concurrent.futures.Future[str]:
            relayed: concurrent.futures.Future[str] = concurrent.futures.Future()

            def opened(done: concurrent.futures.Future[str]) -> None:
                with contextlib.suppress(ClosedError):  # what waits for it has failed
                    self._post(lambda: settle(relayed, done.result))  # on this thread, which alone may go on

            open_relay(hub, address).add_done_callback(opened)
            return relayed

        introductions = self._exchange.introductions
        introductions.relay, introductions.open_relay = relay, open_here

    def address_for(self, device: str, hosts: Mapping[str, RemoteHost]) -> tuple[str, str]:
        """Return the caller's address and public key for a device's worker; ``hosts`` are those of devices on other hosts.

        Raises ArgumentError or ResourceError if the caller can't listen where they reach it.
        """
        for name, host in hosts.items():
            self._call(functools.partial(self._exchange.locate_worker, name, host))
        hub = self._exchange.introductions.relay(device, CALLER)
        if hub is not None and device in hosts:
            opened = self._exchange.introductions.open_relay(hub, self._reach.address(CALLER, hub))
            if not concurrent.futures.wait([opened], START_S).done:
                raise StepTimeoutError(f"the daemon of device {hub!r} did not open a relay within {START_S:g} s")
            self._reach.add_relay(device, CALLER, opened.result())
        return self._reach.address(CALLER, device), self._mailbox.public_key

    def authorise_worker(self, device: str, public_key: str) -> None:
        """Accept messages that come with a key as those of a device's worker; return once they are accepted."""
        self._call(lambda: self._exchange.authorise_worker(device, public_key))

    def drop_worker(self, device: str) -> None:
        """Drop a device and its worker; does nothing once the engine is stopped, or in a forked child."""
        with contextlib.suppress(ClosedError, UnsupportedOperationError):
            self._call(lambda: self._exchange.drop_worker(device))

    def wait_for_worker(self, name: str, timeout_s: float) -> None:
        """Wait until a worker is ready."""
        self.check_owner()
        in_time = wait_in_pieces(self._exchange.settled[name].wait, timeout_s)
        if self._stopping:
            raise closed()
        if name in self._exchange.ended:
            raise WorkerDiedError(name, self._exchange.ended[name])
        if name in self._exchange.failed:
            raise renewed(self._exchange.failed[name])
        if not in_time:
            state = "it has not said hello" if name not in self._exchange.pids else "it is not connected to all others"
            raise StepTimeoutError(
                f"the worker on device {name!r} was not ready within timeout_s={timeout_s:g} ({state}): raise it on a busy "
                "machine"
            )

    def ended_devices(self) -> frozenset[str]:
        """Devices whose workers have ended."""
        return frozenset(self._exchange.ended)

    def pids(self, devices: Iterable[str]) -> dict[str, int]:
        """Process ids of these devices' workers that are ready and have not ended, as they see them themselves."""
        known = self._exchange.pids
        return {name: known[name] for name in devices if name in known and name not in self._exchange.ended}

    def peer(self, name: str) -> tuple[str, str]:
        """Address and public key of a worker that is ready, or of the caller."""
        if name == CALLER:
            return self._mailbox.address, self._mailbox.public_key
        return self._exchange.addresses[name], self._exchange.public_keys[name]

    def environments(self) -> dict[str, Environment]:
        """Return what the caller and the workers that are ready compute with, by name."""
        return {CALLER: _own_environment(), **self._exchange.environments}

    def may_lend(self, lender: str, borrower: str) -> bool:
        """Whether one device may give weights that it holds to another: what trusted ones hold stays on such."""
        return lender not in self.trusted or borrower in self.trusted

    def next_request(self) -> int:
        """Return a number for the message of a `request`; each is given once."""
        return next(self._requests)

    def request(
        self,
        device: str,
        message: Request,
        what: str,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
        helpers: Sequence[str] = (),
        tensors: tuple[Tensor, ...] = (),
    ) -> concurrent.futures.Future[object]:
        """Ask one worker for something; the future fails with the library's errors.

        ``what`` is for the time-out's message. ``on_progress`` is told the bytes loaded so far, on the I/O thread, and
        each report starts the time-out anew. ``helpers`` are the devices of other workers without which the answer
        can't come. ``tensors`` are sent with the message.
        """
        check(message)  # a worker would drop one with a field of a wrong type, and the wait would be for nothing
        pending = Pending(
            devices=frozenset([device, *helpers]),
            asked=device,
            answer=ANSWERS[type(message)],
            model=message.model if isinstance(message, _OF_A_MODEL) else None,
            what=f"{what} on device {device!r}",
            timeout_s=timeout_s,
            deadline=time.monotonic() + timeout_s,
            on_progress=on_progress,
            passes_cuts=isinstance(message, CutLinks | EmulateDevice),
        )
        key = ("request", message.request, 0)
        self._post(lambda: self._exchange.send_request(device, message, tensors, key, pending))
        return pending.future

    def step(
        self,
        devices: Sequence[str],
        step: Step,
        tensors: tuple[Tensor, ...],
        timeout_s: float,
        run: RunStart | None = None,
    ) -> concurrent.futures.Future[object]:
        """Send a step through the stages on these devices; the future gives the last stage's `StepReply`, or the last one of a run."""
        pending = Pending(
            devices=frozenset(devices),
            asked=devices[-1],
            answer=ANSWERS[Step if run is None else BeginRun],
            model=step.model,
            what=f"a step through devices {', '.join(map(repr, devices))}",
            timeout_s=timeout_s,
            deadline=time.monotonic() + timeout_s,
            part_senders=tuple(devices) if step.records or step.captures else (),
            takes_hooks=bool(step.hooks),
            on_tokens=None if run is None else run.on_tokens,
        )
        future = pending.future  # before the step is sent: it has another one as soon as it has stopped at a hook
        self._post(lambda: self._exchange.send_step(devices, step, tensors, pending, run))
        return future

    def packed_step(
        self, devices: Sequence[str], step: PackedStep, tensors: tuple[Tensor, ...], timeout_s: float
    ) -> concurrent.futures.Future[object]:
        """Send a packed step through the stages on these devices; the future gives the last stage's `PackedAnswer`."""
        check(step)
        pending = Pending(
            devices=frozenset(devices),
            asked=devices[-1],
            answer=ANSWERS[PackedStep],
            model=step.model,
            what=f"a packed step through devices {', '.join(map(repr, devices))}",
            timeout_s=timeout_s,
            deadline=time.monotonic() + timeout_s,
        )
        self._post(lambda: self._exchange.send_request(devices[0], step, tensors, ("packed", step.number, 0), pending))
        return pending.future

    def answer_hooks(self, device: str, message: HookAnswered, tensors: tuple[Tensor, ...]) -> None:
        """Send what hooks have made of a call to the worker whose step waits for it."""
        self._post(lambda: self._exchange.answer_hooks(device, message, tensors))

    def send_command(self, device: str, message: _Command) -> None:
        """Send a command that has no answer; does nothing once the engine is stopped, or in a forked child."""
        with contextlib.suppress(ClosedError, UnsupportedOperationError):
            self._post(lambda: self._exchange.send_command(device, message, message.model))

    def end_session(self, devices: Sequence[str], message: EndSession) -> None:
        """Free a session on the stages on these devices, as `send_command`."""
        with contextlib.suppress(ClosedError, UnsupportedOperationError):
            self._post(lambda: self._exchange.end_session(devices, message))

    def unload_model(self, model: int) -> None:
        """Free a model on all devices, unless `send_command` would do nothing; what waits for it fails with `ClosedError`."""
        with contextlib.suppress(ClosedError, UnsupportedOperationError):
            self._post(lambda: self._exchange.unload_model(model))

    def share_files(self, load: SharedLoad) -> None:
        """Send parts of files to a worker that asks for them, until `end_sharing`."""
        self._post(lambda: self._exchange.files.begin(load))

    def end_sharing(self, load: int) -> None:
        """Send no more parts of files for a load, by the number of its request; does nothing once the engine is stopped."""
        with contextlib.suppress(ClosedError, UnsupportedOperationError):
            self._post(lambda: self._exchange.files.end(load))

    def shape_link(self, device: str, link: Link) -> None:
        """Send messages to a worker through an emulated link from now on."""
        self._post(lambda: self._mailbox.shape_link(device, link.bandwidth_bytes_per_s, link.latency_s))

    def expect_delays(self, devices: Sequence[str]) -> None:
        """Accept delayed messages from these devices, as the links that they emulate require."""
        self._post(lambda: self._mailbox.expect_delays(devices))

    def cut_links(self, devices: Iterable[str]) -> None:
        """Handle no messages of these devices, and those of all others that have come while their links were cut."""
        self._call(lambda: self._exchange.cut_links(devices))

    def mark_dead(self, device: str, how: str) -> None:
        """Mark a worker as dead and fail every pending answer that depends on it."""
        with contextlib.suppress(ClosedError):
            self._post(lambda: self._exchange.mark_dead(device, how))

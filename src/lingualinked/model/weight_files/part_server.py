"""Serves parts of files to other parties from a thread of its own, one part in memory at a time.

Knows who may fetch which ranges, and files; no messages and no sockets.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.byte_ranges import ByteRange, checksum_bytes
from lingualinked.model.weight_files.fetching import HeldFiles
from lingualinked.model.weight_files.shared_parts import SharedParts

logger = logging.getLogger("lingualinked.weights")

_TURN_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPart:
    """A part that was requested, with its bytes as a tensor and their checksum; or why there are none."""

    load: int
    part: ByteRange
    receipt: int
    data: tuple[Tensor, ...] = ()
    checksum: int = 0
    error: str = ""


_Opened = dict[ModelSpec, HeldFiles]
"""The files that the thread has open."""


class PartServer:
    """The ranges of files that others may fetch here, for loads by their numbers; for use by one thread.

    `open_files` opens what is held of a checkpoint's files. `send` is called in the server's own thread, which lives while
    something is shared, with a party, a part and a callable: that is to be called, in any thread, once the part has left,
    and no further part is read before.
    """

    def __init__(
        self,
        open_files: Callable[[ModelSpec], HeldFiles],
        send: Callable[[str, ServedPart, Callable[[], None]], None],
        start_thread: Callable[[threading.Thread], None] = threading.Thread.start,
    ) -> None:
        self._open_files = open_files
        self._send = send
        self._start_thread = start_thread
        self._shared: dict[tuple[int, str], tuple[ModelSpec, SharedParts]] = {}
        self._jobs: queue.SimpleQueue[Callable[[_Opened], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def borrowers(self, load: int) -> tuple[str, ...]:
        """Return who may fetch parts for a load."""
        return tuple(name for number, name in self._shared if number == load)

    def find_held(self, spec: ModelSpec, report: Callable[[tuple[ByteRange, ...]], None]) -> None:
        """Report what is held of a checkpoint's files, in the server's thread: nothing if they can't be read."""
        self._run(lambda opened: report(self._list_held(opened, spec)))

    def share(self, load: int, borrower: str, spec: ModelSpec, ranges: Iterable[ByteRange]) -> None:
        """Let a party fetch these ranges of a checkpoint's files."""
        self._shared[load, borrower] = spec, SharedParts(ranges)

    def end_sharing(self, load: int, borrower: str) -> None:
        """Let a party fetch nothing more for a load; files that nobody may fetch any more are closed."""
        ended = self._shared.pop((load, borrower), None)
        if ended is not None and all(spec != ended[0] for spec, _ in self._shared.values()):
            self._run(lambda opened: _close_files(opened, ended[0]))

    def request_part(self, load: int, borrower: str, part: ByteRange, receipt: int) -> None:
        """Read a part and send it; raise ProtocolError if the party may not have it."""
        if (load, borrower) not in self._shared:
            raise ProtocolError(f"{borrower!r} may fetch nothing here for the load {load}")
        spec, shared = self._shared[load, borrower]
        new = shared.admit(part, receipt)
        self._run(lambda opened: self._serve(opened, borrower, load, spec, part, new))

    def close(self) -> None:
        """End the thread, and close all files."""
        self._stopping.set()
        self._shared.clear()
        thread = self._thread
        if thread is not None:
            self._end_thread()
            thread.join()

    def _run(self, job: Callable[[_Opened], None]) -> None:
        """Run a job in the thread, which ends after it if nothing is shared."""
        if self._thread is None:
            thread = threading.Thread(target=self._run_jobs, args=(self._jobs,), name="lingualinked-files", daemon=True)
            self._start_thread(thread)
            self._thread = thread
        self._jobs.put(job)
        if not self._shared:
            self._end_thread()

    def _end_thread(self) -> None:
        self._jobs.put(None)
        self._thread, self._jobs = None, queue.SimpleQueue()

    def _run_jobs(self, jobs: queue.SimpleQueue[Callable[[_Opened], None] | None]) -> None:
        opened: _Opened = {}
        while (job := jobs.get()) is not None and not self._stopping.is_set():
            job(opened)
        for spec in list(opened):
            _close_files(opened, spec)

    def _open(self, opened: _Opened, spec: ModelSpec) -> HeldFiles:
        if spec not in opened:
            opened[spec] = self._open_files(spec)
        return opened[spec]

    def _list_held(self, opened: _Opened, spec: ModelSpec) -> tuple[ByteRange, ...]:
        try:
            return self._open(opened, spec).held
        except Exception as error:  # noqa: BLE001 - whoever asks is told that nothing is here, and the thread goes on
            logger.warning("the files of %s on this device can't be read: %s", spec.class_name, error)
            return ()

    def _serve(self, opened: _Opened, borrower: str, load: int, spec: ModelSpec, part: ByteRange, receipt: int) -> None:
        try:
            read = bytearray(self._open(opened, spec).read(part))
            data = (torch.frombuffer(read, dtype=torch.uint8),)
            served = ServedPart(load=load, part=part, receipt=receipt, data=data, checksum=checksum_bytes(read))
        except Exception as error:  # noqa: BLE001 - the party is told, and the thread goes on
            served = ServedPart(load=load, part=part, receipt=receipt, error=str(error))
        sent = threading.Event()
        self._send(borrower, served, sent.set)
        while not sent.wait(_TURN_S) and not self._stopping.is_set():
            pass


def _close_files(opened: _Opened, spec: ModelSpec) -> None:
    held = opened.pop(spec, None)
    if held is not None:
        held.close()

"""The caller's files that workers on other hosts fetch while they load stages, and which workers send theirs to which others.

Knows loads by their numbers, parts and who may have them; runs on the I/O thread, and reads files in one of its own.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from torch import Tensor

from lingualinked.errors import ClosedError, LingualinkedError, ProtocolError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.byte_ranges import ByteRange
from lingualinked.model.weight_files.held_files import WholeFiles
from lingualinked.model.weight_files.part_server import PartServer, ServedPart
from lingualinked.processes.resources import start_thread
from lingualinked.protocol.messages import CallerMessage
from lingualinked.protocol.weights import FetchPart, StopSharing, answer_with, range_of

logger = logging.getLogger("lingualinked.cluster")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SharedLoad:
    """A load of a stage, by the number of its `LoadStage`: who loads, what of which files, and the workers that have some."""

    number: int
    borrower: str
    spec: ModelSpec
    ranges: tuple[ByteRange, ...]
    sources: tuple[str, ...]


class FileSharing:
    """The loads that go on, for which parts of files are sent.

    `send` sends a message to a worker; `post` makes the I/O thread call something, for use by the thread that reads.
    """

    def __init__(
        self,
        send: Callable[[str, CallerMessage, tuple[Tensor, ...]], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._send = send
        self._post = post
        self._loads: dict[int, SharedLoad] = {}
        self._server = PartServer(lambda spec: WholeFiles(spec.files), self._send_served, start_thread)

    def begin(self, load: SharedLoad) -> None:
        """Send parts to a worker that asks, until its load ends."""
        self._loads[load.number] = load
        self._server.share(load.number, load.borrower, load.spec, load.ranges)

    def end(self, number: int) -> None:
        """Send no more parts for a load, and make the workers that did so stop; does nothing if it has ended."""
        load = self._loads.pop(number, None)
        if load is not None:
            self._server.end_sharing(number, load.borrower)
            for source in load.sources:
                self._stop(source, StopSharing(load=number, name=load.borrower, reason="it has loaded its stage"))

    def lose_worker(self, name: str, how: str) -> None:
        """Tell those that fetch from a worker that it has ended."""
        for load in self._loads.values():
            if name in load.sources:
                self._stop(load.borrower, StopSharing(load=load.number, name=name, reason=f"has ended: {how}"))

    def send_part(self, message: FetchPart, borrower: str) -> None:
        """Read a part and send it to the worker that has asked; raise ProtocolError if it may not have it."""
        load = self._loads.get(message.load)
        if load is None:
            return  # the load has failed meanwhile, or its model was unloaded
        if load.borrower != borrower:
            raise ProtocolError(f"{borrower!r} asked for a part that {load.borrower!r} is to load")
        self._server.request_part(message.load, borrower, range_of(message), message.receipt)

    def close(self) -> None:
        """Close all files, and end the thread that reads."""
        self._loads.clear()
        self._server.close()

    def _stop(self, device: str, message: StopSharing) -> None:
        try:
            self._send(device, message, ())
        except LingualinkedError as error:  # it has ended, too
            logger.debug("%r was not told to stop sharing files: %s", device, error)

    def _send_served(self, borrower: str, served: ServedPart, on_sent: Callable[[], None]) -> None:
        """Send a part; called in the thread that reads."""
        message = answer_with(served)

        def send() -> None:
            try:
                if served.load in self._loads:
                    self._send(borrower, message, served.data)
            finally:
                on_sent()

        try:
            self._post(send)
        except ClosedError:
            on_sent()

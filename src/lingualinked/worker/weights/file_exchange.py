"""What a worker fetches of a checkpoint's files for its own stages, and sends of those that it has to other workers.

Knows messages, peers and the weights on this device's disk; files are read in threads beside the worker's loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lingualinked.errors import CheckpointError, LingualinkedError
from lingualinked.model.custom_code import restrict_to
from lingualinked.model.weight_files.byte_ranges import ByteRange
from lingualinked.model.weight_files.fetching import FetchError
from lingualinked.model.weight_files.local_copies import copy_folders
from lingualinked.model.weight_files.part_server import PartServer, ServedPart
from lingualinked.model.weight_files.storage import WeightStorage
from lingualinked.model.weight_files.weight_cache import WeightCache
from lingualinked.protocol.boot import WeightFolders
from lingualinked.protocol.messages import LoadStage
from lingualinked.protocol.weights import (
    FetchPart,
    FilePart,
    FilesFound,
    FindFiles,
    ShareFiles,
    StopSharing,
    WeightMessage,
    answer_with,
    range_of,
)
from lingualinked.worker.background import Background
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.weights.part_fetcher import PartFetcher

if TYPE_CHECKING:
    from lingualinked.model.spec import ModelSpec
    from lingualinked.model.weight_files.fetching import HeldFiles
    from lingualinked.model.weights.weight_sources import WeightSource
    from lingualinked.transport.wire.delivery import Delivery


class StageFiles:
    """The files for one stage that is loading, of which what is not here is fetched; for the loading thread."""

    def __init__(self, storage: WeightStorage, fetcher: PartFetcher, on_end: Callable[[], object]) -> None:
        self._storage = storage
        self._fetcher = fetcher
        self.end = on_end
        """Fetch nothing more."""

    def open_weights(
        self, spec: ModelSpec, check_wanted: Callable[[], None], on_fetched: Callable[[int], None]
    ) -> WeightSource:
        """Open the weights of some layers.

        `check_wanted` raises once the stage is not wanted any more; `on_fetched` is told the bytes fetched so far.
        """
        if not spec.contents:
            raise FetchError("the caller could not read its files when these layers were to be loaded here")
        self._fetcher.check_wanted, self._fetcher.on_fetched = check_wanted, on_fetched
        return self._storage.open_weights(spec, self._fetcher)


class FileExchange:
    """The files of one worker that does not read the caller's: those in its `storage`, and what others have.

    The worker of a caller on this host needs none: without `storage` nothing is fetched and nothing is here.
    """

    def __init__(
        self, storage: WeightStorage | None, peers: Peers, background: Background, *, verifies: bool = False
    ) -> None:
        self._storage = storage
        self._verifies = verifies
        self._peers = peers
        self._background = background
        self._fetchers: dict[int, PartFetcher] = {}  # of the stages that are loading, by the numbers of their requests
        self._awaited: Counter[tuple[int, str]] = Counter()  # parts requested and not received, by load and source
        self._server = PartServer(self._open_held, self._send_served)

    @classmethod
    def open(cls, folders: WeightFolders | None, peers: Peers, background: Background) -> FileExchange:
        """Make it for a worker whose weights are in these folders, if it does not read the caller's files."""
        if folders is None:
            return cls(None, peers, background)
        models = None if folders.models is None else Path(folders.models)
        restrict_to(copy_folders(models) if folders.allows_code else ())
        cache = WeightCache(Path(folders.cache), folders.cache_bytes, folders.owner) if folders.cache_bytes else None
        return cls(WeightStorage(models=models, cache=cache), peers, background, verifies=folders.verifies)

    def files_of(self, request: LoadStage) -> StageFiles | None:
        """Return the files for a stage that is to be loaded; None: the caller's files are read."""
        if self._storage is None:
            return None

        def request_part(source: str, part: ByteRange, receipt: int) -> None:
            self._background.call_on_loop(lambda: self._request_part(request.request, source, part, receipt))

        names = [content.name for content in request.spec.contents]
        fetcher = PartFetcher(request.supplies, names, request_part, self._background.call_on_loop)
        self._fetchers[request.request] = fetcher
        return StageFiles(
            self._storage, fetcher, lambda: self._background.call_on_loop(lambda: self._end_load(request.request))
        )

    def sources(self, load: int) -> Collection[str]:
        """Return who may send parts for a stage that is loading: those from which some are awaited."""
        return [name for (number, name), num_awaited in self._awaited.items() if number == load and num_awaited > 0]

    def borrowers(self, load: int) -> Collection[str]:
        """Return who may fetch parts here for a stage that is loading there."""
        return self._server.borrowers(load)

    def handle(self, message: WeightMessage, delivery: Delivery) -> None:
        """Handle a message about parts of files."""
        match message:
            case FetchPart():
                self._server.request_part(message.load, delivery.sender, range_of(message), message.receipt)
            case FilePart():
                self._awaited[message.load, delivery.sender] -= 1
                if message.load in self._fetchers:
                    data = delivery.tensors[0] if delivery.tensors else None
                    self._fetchers[message.load].deliver_part(delivery.sender, message, data)
            case StopSharing():
                self._server.end_sharing(message.load, message.name)
                if message.load in self._fetchers:
                    self._fetchers[message.load].lose_source(message.name, message.reason)

    def find_files(self, message: FindFiles, answer: Callable[[FilesFound], None]) -> None:
        """Find out what is here of a checkpoint's files; the answer is given on the worker's loop, later."""

        def report(held: tuple[ByteRange, ...]) -> None:
            ranges = tuple((each.file, each.start, each.stop) for each in held)
            found = FilesFound(request=message.request, ranges=ranges, verifies=self._verifies)
            self._background.call_on_loop(lambda: answer(found))

        self._server.find_held(message.spec, report)

    def share(self, message: ShareFiles) -> None:
        """Let a worker fetch ranges of files here."""
        ranges = [ByteRange(*bounds) for bounds in message.ranges]
        self._server.share(message.load, message.borrower, message.spec, ranges)

    def _end_load(self, load: int) -> None:
        self._fetchers.pop(load, None)
        for key in [key for key in self._awaited if key[0] == load]:
            del self._awaited[key]

    def _open_held(self, spec: ModelSpec) -> HeldFiles:
        if self._storage is None:
            raise CheckpointError("this worker has no files of its own")
        return self._storage.open_held(spec)

    def _request_part(self, load: int, source: str, part: ByteRange, receipt: int) -> None:
        message = FetchPart(load=load, file=part.file, start=part.start, num_bytes=part.num_bytes, receipt=receipt)
        try:
            self._peers.send(source, message)
            self._awaited[load, source] += 1
        except LingualinkedError as error:
            if load in self._fetchers:
                self._fetchers[load].lose_source(source, f"can't be reached: {error}")

    def _send_served(self, borrower: str, served: ServedPart, on_sent: Callable[[], None]) -> None:
        """Send a part; called in the server's thread."""
        message = answer_with(served)

        def send() -> None:
            try:
                self._peers.send(borrower, message, served.data)
            finally:
                on_sent()

        self._background.call_on_loop(send)

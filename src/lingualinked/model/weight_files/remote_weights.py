"""The weights of a caller on another host: files that lie here as well, a cache on this disk, and a fetcher for the rest.

Knows files and byte ranges; not how bytes are fetched, or from whom.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from lingualinked.errors import CheckpointError
from lingualinked.model.weight_files.byte_ranges import ByteRange, merge_ranges, num_bytes_of, subtract_ranges
from lingualinked.model.weight_files.cached_file import DamagedPartsError
from lingualinked.model.weight_files.describing import digest_header, digest_tensor, model_name
from lingualinked.model.weight_files.fetching import FetchError
from lingualinked.model.weight_files.filling import fill_files
from lingualinked.model.weight_files.span_ranges import locate_tensors
from lingualinked.model.weights.safetensors_file import SafetensorsFile, empty_tensor, header_size, parse_header
from lingualinked.quantities import bytes_text, count_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from lingualinked.model.spec import ModelSpec
    from lingualinked.model.weight_files.cached_file import CachedFile
    from lingualinked.model.weight_files.fetching import Fetcher
    from lingualinked.model.weight_files.local_copies import LocalCopies
    from lingualinked.model.weight_files.weight_cache import WeightCache
    from lingualinked.model.weights.safetensors_file import TensorEntry

logger = logging.getLogger("lingualinked.model")


class RemoteWeights:
    """A `lingualinked.model.weights.weight_sources.WeightSource` for a worker on another host than the caller.

    A file that lies here is read; of others, the header and the prepared tensors are fetched into the cache, as far as it
    lacks them, or into memory if there is no cache. If the specification has the digests of tensors, each is checked.
    """

    def __init__(self, spec: ModelSpec, copies: LocalCopies, cache: WeightCache | None, fetcher: Fetcher) -> None:
        self._contents = spec.contents
        self._model = model_name(Path(spec.files[0].path))
        self._cache = cache
        self._fetcher = fetcher
        self._local: dict[int, SafetensorsFile] = {}
        self._cached: dict[int, CachedFile] = {}
        self._places: dict[str, ByteRange] = {}  # of tensors
        self.num_bytes_read = 0
        try:
            # 1) find the files that lie here
            found, self._differences = copies.find(spec)
            for difference in self._differences:
                logger.warning("%s: it is not used, and what is missing of the weights is fetched", difference)
            self._local = {index: SafetensorsFile(file) for index, file in enumerate(found) if file is not None}
            # 2) open the cache for the others
            others = [index for index in range(len(found)) if index not in self._local]
            if cache is not None:
                for index in others:
                    self._cached[index] = cache.open_file(spec.contents[index], self._model)
            # 3) read all headers
            headers = self._read_headers(others)
            entries = [
                self._local[index].entries if index in self._local else self._parse(index, headers[index])
                for index in range(len(found))
            ]
            # 4) find the tensors in them
            self._places = locate_tensors(entries)
            self._entries: Mapping[str, TensorEntry] = {
                name: entries[place.file][name] for name, place in self._places.items()
            }
            self._digests = self._digests_by_name(entries)
            self.shapes = {name: entry.shape for name, entry in self._entries.items()}
            for index, cached in self._cached.items():
                cached.set_boundaries(edge for entry in entries[index].values() for edge in (entry.start, entry.stop))
        except BaseException:
            self.close()
            raise

    def prepare(self, names: Iterable[str]) -> None:
        """Fetch what is missing of these tensors into the cache.

        Raises
        ------
        FetchError
            If no source has it.
        ResourceError
            If the disk or the cache is too small.
        """
        self._fill([self._places[name] for name in names if self._places[name].file in self._cached])

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, and only its own bytes; raise CheckpointError if it is not the caller's."""
        tensor, target = empty_tensor(self._entries[name])
        self._read(self._places[name], target)
        digest = self._digests.get(name)
        if digest is not None and digest_tensor(target) != digest:
            self._read_again(name, target)
            if digest_tensor(target) != digest:
                raise CheckpointError(self._differing(name))
        self.num_bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Close all files; the cache may remove them from then on."""
        for local in self._local.values():
            local.close()
        for cached in self._cached.values():
            cached.close()

    def _read(self, place: ByteRange, target: memoryview) -> None:
        if not place.num_bytes:
            return
        if place.file in self._local:
            self._local[place.file].read_into(place.start, target)
        elif place.file in self._cached:
            try:
                self._cached[place.file].read_into(place.start, target)
            except DamagedPartsError:  # they are no longer on record
                logger.warning(
                    "%s: the disk has changed cached bytes, which are fetched again", self._path_of(place.file)
                )
                self._fill([place])
                try:
                    self._cached[place.file].read_into(place.start, target)
                except DamagedPartsError:
                    raise CheckpointError(
                        f"{self._path_of(place.file)} on host {socket.gethostname()!r} can't be read back as it was written: "
                        "check the disk, or set XDG_CACHE_HOME to a folder on another one"
                    ) from None
        else:
            self._fetch_into(place, target)

    def _read_again(self, name: str, target: memoryview) -> None:
        """Fetch a tensor again whose bytes differ from the caller's, unless they are those of a file that lies here."""
        place = self._places[name]
        if place.file in self._cached:
            self._cached[place.file].drop_range(place.start, place.stop)
            self._fill([place])
        if place.file not in self._local:
            self._read(place, target)

    def _differing(self, name: str) -> str:
        place, host = self._places[name], socket.gethostname()
        if place.file in self._local:
            path = self._local[place.file].path
            return f"{name} in {path} on host {host!r} differs from the caller's: copy the caller's file there, or move it away"
        return f"{name} was fetched to host {host!r} and differs from what the caller described: has its file been changed?"

    def _fill(self, ranges: Iterable[ByteRange]) -> None:
        """Fetch what the cache lacks of some ranges."""
        assert self._cache is not None or not self._cached
        if self._cache is None:
            return
        missing = self._missing(ranges)
        if not missing:
            return
        by_file = {index: [each for each in missing if each.file == index] for index in {each.file for each in missing}}
        self._cache.reserve([(self._cached[index], each) for index, each in by_file.items()])
        logger.info("%s of %s are fetched into %s", bytes_text(num_bytes_of(missing)), self._model, self._cache.folder)
        try:
            with self._cache.disk_errors(num_bytes_of(missing)):
                fill_files(self._cached, missing, self._fetcher)
        except FetchError as error:
            raise self._unavailable(error, missing) from error

    def _missing(self, ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
        """Return what the cache lacks of some ranges."""
        merged = merge_ranges(ranges)
        indices = {each.file for each in merged} & self._cached.keys()
        return subtract_ranges(merged, [each for index in indices for each in self._cached[index].held(index)])

    def _fetch_into(self, place: ByteRange, target: memoryview) -> None:
        """Fetch a range into memory."""
        got: list[ByteRange] = []

        def deliver(part: ByteRange, data: bytes | bytearray | memoryview) -> None:
            if not place.covers(part) or len(data) != part.num_bytes:
                raise FetchError(f"a source sent {part}, and {place} was requested")
            target[part.start - place.start : part.stop - place.start] = data
            got.append(part)

        try:
            self._fetcher.fetch([place], deliver)
        except FetchError as error:
            raise self._unavailable(error, [place]) from error
        if subtract_ranges([place], got):
            raise FetchError(f"the sources have not sent all of {place}")

    def _unavailable(self, error: FetchError, ranges: Iterable[ByteRange]) -> FetchError:
        also = f"; nor can a copy on this host be used: {'; '.join(self._differences)}" if self._differences else ""
        return FetchError(f"{self._describe_missing(ranges)} can't be fetched: {error}{also}")

    def _describe_missing(self, ranges: Iterable[ByteRange]) -> str:
        """Name the tensors that ranges belong to and that are not here."""
        missing = self._missing(ranges)
        names = [name for name, place in self._places.items() if any(place.overlaps(each) for each in missing)]
        if not names:
            return f"headers of files of {self._model}"
        more = f" and {count_text(len(names) - 1, 'other tensor')}" if len(names) > 1 else ""
        return f"{names[0]}{more} of {self._model}"

    def _read_headers(self, indices: list[int]) -> dict[int, bytes]:
        places = {index: ByteRange(index, 0, self._contents[index].header_bytes) for index in indices}
        self._fill(places.values() if self._cached else ())
        headers: dict[int, bytes] = {}
        for index, place in places.items():
            header = bytearray(place.num_bytes)
            self._read(place, memoryview(header))
            if index in self._cached and digest_header(header) != self._contents[index].header_digest:
                self._cached[index].drop_range(place.start, place.stop)
                self._fill([place])
                self._read(place, memoryview(header))
            if digest_header(header) != self._contents[index].header_digest:
                raise CheckpointError(
                    f"the header of {self._contents[index].name} that was fetched is not the one that the caller described: "
                    "load the model again once nothing writes to the file"
                )
            headers[index] = bytes(header)
            if index in self._cached:
                self._cached[index].close_data()
            self.num_bytes_read += len(header)
        return headers

    def _parse(self, index: int, header: bytes) -> dict[str, TensorEntry]:
        content = self._contents[index]
        if header_size(content.name, header, content.num_bytes) != len(header):
            raise CheckpointError(
                f"the header of {content.name} is not as long as the caller said: load the model again"
            )
        return parse_header(content.name, header[8:], content.num_bytes)

    def _digests_by_name(self, entries: Sequence[Mapping[str, TensorEntry]]) -> dict[str, str]:
        digests: dict[str, str] = {}
        for content, own in zip(self._contents, entries, strict=True):
            if content.tensor_digests:
                in_order = sorted(own, key=lambda name: (own[name].start, own[name].stop))
                digests |= dict(zip(in_order, content.tensor_digests, strict=True))
        return digests

    def _path_of(self, index: int) -> Path:
        return self._cached[index].folder / "data"

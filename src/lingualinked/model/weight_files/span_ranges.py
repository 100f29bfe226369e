"""Which bytes of a checkpoint's files a span of layers needs: what a worker may ask for.

Knows specifications and headers; fetches and serves nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from lingualinked.model.cutting.model_parts import check_span
from lingualinked.model.cutting.parts import build_meta, parts_of
from lingualinked.model.weight_files.byte_ranges import ByteRange, merge_ranges
from lingualinked.model.weights.safetensors_file import SafetensorsFile
from lingualinked.model.weights.span_loading import choose_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lingualinked.model.spec import CheckpointFile, ModelSpec
    from lingualinked.model.weights.safetensors_file import TensorEntry


@functools.lru_cache(maxsize=256)
def ranges_of_span(spec: ModelSpec, start: int, end: int) -> tuple[ByteRange, ...]:
    """Return the bytes that layers ``[start, end)`` need, merged: all headers, and the tensors that `load_span` reads.

    The files must be readable here. A part of a span needs no more than the span.
    """
    if not spec.files:
        return ()
    headers, places, shapes = _read_headers(spec.files)
    whole = build_meta(spec)
    parts = parts_of(spec, whole)
    check_span(start, end, parts.num_layers)
    chosen = choose_tensors(whole, parts, shapes, start, end)
    return merge_ranges([*headers, *(places[key] for key in chosen.values())])


@functools.lru_cache(maxsize=2)  # of a model with many experts it takes seconds, and there is a span for each device
def _read_headers(
    files: tuple[CheckpointFile, ...],
) -> tuple[list[ByteRange], dict[str, ByteRange], dict[str, tuple[int, ...]]]:
    """Read where all headers lie, where all tensors, and their shapes."""
    opened = [SafetensorsFile(file) for file in files]
    headers = [ByteRange(index, 0, file.header_bytes) for index, file in enumerate(opened)]
    shapes = {name: entry.shape for file in opened for name, entry in file.entries.items()}
    return headers, locate_tensors([file.entries for file in opened]), shapes


def locate_tensors(files: Sequence[Mapping[str, TensorEntry]]) -> dict[str, ByteRange]:
    """Return where each tensor of a checkpoint's files lies."""
    return {
        name: ByteRange(index, entry.start, entry.stop)
        for index, entries in enumerate(files)
        for name, entry in entries.items()
    }

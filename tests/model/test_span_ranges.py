"""The bytes that a span may ask for are exactly those that loading it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conversations import spec_of
from families import save_tiny
from lingualinked.model.weight_files.byte_ranges import num_bytes_of, subtract_ranges
from lingualinked.model.weight_files.held_files import WholeFiles
from lingualinked.model.weight_files.span_ranges import ranges_of_span
from lingualinked.model.weights.span_loading import load_span

SPANS = [(0, 1), (1, 3), (3, 4), (0, 4)]


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "phi3"])
def test_a_span_reads_its_ranges_and_no_more(family: str, max_shard_size: str, tmp_path: Path) -> None:
    spec = spec_of(save_tiny(family, torch.float32, tmp_path, max_shard_size=max_shard_size))
    for start, end in SPANS:
        assert num_bytes_of(ranges_of_span(spec, start, end)) == load_span(spec, start, end).num_bytes_read
    for start, end in SPANS:  # what a rebalance loads is a part of a span
        assert subtract_ranges(ranges_of_span(spec, start, end), ranges_of_span(spec, 0, 4)) == ()


def test_served_bytes_are_the_files(tmp_path: Path) -> None:
    spec = spec_of(save_tiny("llama", torch.float32, tmp_path, max_shard_size="20KB"))
    served = WholeFiles(spec.files)
    for part in ranges_of_span(spec, 1, 2):
        assert served.read(part) == Path(spec.files[part.file].path).read_bytes()[part.start : part.stop]
    served.close()

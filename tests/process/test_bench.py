"""Each measurement runs on real workers, and what it compares has the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lingualinked as ll
from lingualinked.cli.bench.decode import measure_decode
from lingualinked.cli.bench.load import measure_load
from lingualinked.cli.bench.measurement import Measurement
from lingualinked.cli.bench.memory import measure_memory_growth
from lingualinked.cli.bench.models import BenchModels, BenchOptions
from lingualinked.cli.bench.overhead import measure_overhead
from lingualinked.cli.bench.prefill import measure_prefill, read_chunk_size
from lingualinked.cli.bench.throughput import measure_sessions

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def models() -> Iterator[BenchModels]:
    threads = torch.get_num_threads()
    options = BenchOptions(
        model=ll.sample_model(), plan="even", against=("uncut-1", "one-step", "lingualinked"), repeats=1
    )
    with BenchModels(options) as models:
        assert models.sharded.plan.num_layers == models.uncut.config.num_hidden_layers
        assert models.paper_way is not models.sharded
        yield models
    torch.set_num_threads(threads)


def sides(measurements: list[Measurement]) -> list[list[str]]:
    assert all(value > 0 for each in measurements for values in each.values.values() for value in values)
    return [list(each.values) for each in measurements]


def test_decode(models: BenchModels) -> None:
    measured = measure_decode(models, [1, 2], 5, 4, 1)
    assert sides(measured) == 2 * [["sharded", "uncut-1", "one-step", "lingualinked"]]
    assert "equal to" in measured[0].notes[0]
    assert "NOT" not in measured[0].notes[0]
    assert sides(measure_decode(models, [1], 5, 4, 2))


def test_prefill(models: BenchModels) -> None:
    assert sides(measure_prefill(models, [12], read_chunk_size("whole"))) == [["sharded", "uncut-1"]]
    (measured,) = measure_prefill(models, [12], read_chunk_size("5"))
    assert sides([measured]) == [["sharded", "uncut-1", "ideal", "one-step"]]
    assert measured.notes == ("prompts of 12 ran in chunks of 5; the ideal is made of the times that these take alone",)
    for text in ("0", "five"):
        with pytest.raises(ll.ArgumentError, match="positive number of tokens, auto or whole"):
            read_chunk_size(text)


def test_throughput(models: BenchModels) -> None:
    assert sides(measure_sessions(models, 2, 5, 4)) == [["sharded", "one after the other", "uncut-1"]]


def test_load(models: BenchModels) -> None:
    assert sides(measure_load(models, 3, (3, 9), 3)) == [["sharded", "uncut-1", "one after the other"]]


def test_memory(models: BenchModels) -> None:
    measured = measure_memory_growth(models, 200, 5)
    assert sides(measured) == 3 * [["after 200 steps", "after 100"]]


def test_overhead(models: BenchModels) -> None:
    whole, *parts, size, _, back = measure_overhead(models, 8)
    assert whole.values["whole"]
    assert len(parts) == 5
    assert 0 < size.values["the last hop between stages"][0] < 320
    assert all(value > 0 for value in back.values["from the last stage"])

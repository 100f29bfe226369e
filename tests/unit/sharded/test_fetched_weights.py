"""What was fetched is kept within a bound, the parameters used last; and a closed model gives nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lingualinked as ll
from lingualinked.sharded.weights.fetched_weights import FetchedWeights


class Worker:
    """Stands for the workers: counts what is read."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_open = True

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self.asked.append(name)
        return torch.full(shape, float(name), dtype=dtype)

    def check_open(self) -> None:
        if not self.is_open:
            raise ll.ClosedError("closed")


def parameter(num: int) -> Tensor:
    return nn.Parameter(torch.empty(num, device="meta"))


def test_those_used_last_are_kept() -> None:
    worker = Worker()
    weights = FetchedWeights(worker.read, worker.check_open, max_bytes=80)
    first, second, third = (weights.fetch_of(parameter(10), name) for name in "123")
    assert first() is first()
    second()
    first()
    assert weights.num_kept_bytes == 80
    third()
    first()
    second()
    assert worker.asked == ["1", "2", "3", "2"]
    assert weights.num_kept_bytes == 80


def test_one_that_exceeds_the_bound_is_kept_alone_if_there_is_memory() -> None:
    worker = Worker()
    weights = FetchedWeights(worker.read, worker.check_open, max_bytes=80)
    first, large = weights.fetch_of(parameter(10), "1"), weights.fetch_of(parameter(100), "2")
    first()
    assert large() is large()
    assert weights.num_kept_bytes == 400
    first()
    assert weights.num_kept_bytes == 40
    assert worker.asked == ["1", "2", "1"]


def test_what_exceeds_the_bound_and_buffers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.sharded.weights.fetched_weights._MAX_SHARE", 0)
    worker = Worker()
    weights = FetchedWeights(worker.read, worker.check_open, max_bytes=80)
    large, buffer = weights.fetch_of(parameter(21), "1"), weights.fetch_of(torch.empty(1, device="meta"), "2")
    for fetch in (large, buffer):
        assert torch.equal(fetch(), fetch())
    assert worker.asked == ["1", "1", "2", "2"]
    assert weights.num_kept_bytes == 0


def test_a_closed_model_gives_nothing() -> None:
    worker = Worker()
    fetch = FetchedWeights(worker.read, worker.check_open).fetch_of(parameter(3), "1")
    fetch()
    worker.is_open = False
    with pytest.raises(ll.ClosedError):
        fetch()


def test_what_is_fetched_in_inference_mode_serves_for_gradients_later() -> None:
    worker = Worker()
    fetch = FetchedWeights(worker.read, worker.check_open).fetch_of(parameter(3), "2")
    with torch.inference_mode():
        fetch()
    states = torch.ones(3, requires_grad=True)
    (states * fetch()).sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [2.0, 2.0, 2.0]

"""Several steps of one session on their way through the stages at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import lingualinked as ll

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8, 33, 2, 71]])


@pytest.fixture(scope="module")
def model(shared_fork_server: None, tiny_llama: str) -> Iterator[Any]:
    with ll.ShardedModel.from_pretrained(tiny_llama, devices=2, plan="even", progress=False, max_kv_tokens=40) as model:
        yield model


def chunks(cache: Any, num_tokens: int) -> list[Any]:
    return [cache.session.start_step(chunk, None, None, 0) for chunk in IDS.split(num_tokens, dim=1)]


def test_steps_in_flight_give_what_steps_one_by_one_give(model: Any) -> None:
    past = model._open_session()
    expected = [past.session.step(chunk, None, None, 0)[0] for chunk in IDS.split(3, dim=1)]
    other = model._open_session()
    flights = chunks(other, 3)
    assert other.get_seq_length() == IDS.shape[1]
    for flight, logits in zip(flights, expected, strict=True):
        assert torch.equal(flight.finish()[0], logits)
    assert torch.equal(
        other.session.step(IDS[:, :1], None, None, 1)[0], past.session.step(IDS[:, :1], None, None, 1)[0]
    )


def test_they_are_finished_in_order_and_once(model: Any) -> None:
    first, second, third = chunks(model._open_session(), 3)
    with pytest.raises(ll.ArgumentError, match="in the order in which they were started"):
        second.finish()
    for flight in (first, second, third):
        flight.finish()
    with pytest.raises(ll.ArgumentError, match="each once"):
        third.finish()


def test_other_threads_and_changes_wait_for_all_of_them(model: Any) -> None:
    past = model._open_session()
    flights = chunks(past, 4)
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(ll.ArgumentError, match="another thread"):
            pool.submit(past.session.step, IDS[:, :1], None, None, 1).result()
        began = threading.Event()
        moved = pool.submit(
            lambda: (began.set(), model.rebalance(ll.Plan.from_spans([("worker-0", 0, 1), ("worker-1", 1, 4)])))
        )
        began.wait()
        results = [flight.finish()[0] for flight in flights]
        moved.result()
    assert torch.equal(torch.cat(results, dim=1), model(IDS).logits)
    past.session.step(IDS[:, :1], None, None, 1)


def test_a_full_budget_stops_the_next_one_alone(model: Any) -> None:
    past = model._open_session()
    flight = past.session.start_step(IDS, None, None, 1)
    with pytest.raises(ll.KVCapacityError):
        past.session.start_step(IDS.repeat(1, 5), None, None, 1)
    flight.finish()
    past.session.step(IDS[:, :1], None, None, 1)


def test_an_end_loses_them_and_frees_the_session(model: Any) -> None:
    past = model._open_session()
    first, second = chunks(past, 4)
    past.end()
    for flight in (first, second):
        with pytest.raises(ll.ClosedError):
            flight.finish()
    model.get_parameter("lm_head.weight")[0, 0]  # waits for no step

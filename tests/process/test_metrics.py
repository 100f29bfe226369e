"""Metrics are served over HTTP for as long as the model lives, read anew for each scrape, and leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import lingualinked as ll
from lingualinked.telemetry.endpoint import MetricsEndpoint
from lingualinked.telemetry.metrics import Reading
from waiting import wait_until

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])


def scrape(endpoint: MetricsEndpoint, query: str = "") -> dict[str, float]:
    with urllib.request.urlopen(endpoint.url + query, timeout=30) as answer:
        text = answer.read().decode()
    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def served(read: Callable[[], Reading] = Reading) -> Any:
    with MetricsEndpoint(read, 0, "127.0.0.1") as endpoint:
        yield endpoint


# --- the endpoint


def test_each_scrape_reads_anew() -> None:
    readings = iter([Reading(is_current=True), Reading(is_current=False), Reading()])
    with served(lambda: next(readings)) as endpoint:
        assert endpoint.url == f"http://127.0.0.1:{endpoint.port}/metrics"
        assert [scrape(endpoint).get("lingualinked_up") for _ in range(3)] == [1, 0, None]


def test_a_scraper_may_ask_for_some_families() -> None:
    with served() as endpoint:
        found = scrape(endpoint, "?name[]=lingualinked_moved_layers_total")
    assert found == {"lingualinked_moved_layers_total": 0}


def test_a_closed_endpoint_frees_its_port_for_the_next() -> None:
    with served() as endpoint:
        assert is_listening(endpoint.port)
        assert not endpoint.closed
    assert endpoint.closed
    assert not is_listening(endpoint.port)
    endpoint.close()
    with MetricsEndpoint(Reading, endpoint.port, "localhost") as following:
        assert scrape(following)
        assert "closed" not in repr(following)
    assert "closed" in repr(following)


def test_a_client_that_says_nothing_keeps_no_endpoint_open() -> None:
    with contextlib.ExitStack() as clients:
        with served() as endpoint:
            for _ in range(3):
                clients.enter_context(socket.create_connection(("127.0.0.1", endpoint.port)))
            wait_until(lambda: sum("metrics-request" in thread.name for thread in threading.enumerate()) == 3)
            assert scrape(endpoint)
        assert not any("metrics" in thread.name for thread in threading.enumerate())


def test_an_endpoint_is_closed_by_many_at_once_and_by_a_thread_of_ours() -> None:
    with served() as endpoint, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: endpoint.close(), range(8)))
        assert not is_listening(endpoint.port)
    with served() as endpoint:
        closing = threading.Thread(target=endpoint.close, name="lingualinked-io")
        closing.start()
        closing.join()
        wait_until(lambda: not is_listening(endpoint.port))


@pytest.mark.parametrize(("port", "address"), [(-1, "127.0.0.1"), (2**16, "::1"), (True, "::1"), ("9", "::1"), (0, "")])
def test_what_is_no_port_or_address_is_refused(port: Any, address: str) -> None:
    with pytest.raises(ll.ArgumentError, match=f"{port!r} is not a valid port|'' is not a valid address"):
        MetricsEndpoint(Reading, port, address)


def test_where_nothing_can_listen_is_named() -> None:
    with served() as endpoint, pytest.raises(ll.ArgumentError, match=rf"port {endpoint.port} of '127.0.0.1': .*in use"):
        MetricsEndpoint(Reading, endpoint.port, "127.0.0.1")
    with pytest.raises(ll.ArgumentError, match=r"of '192\.0\.2\.1'.*another address of this machine"):
        MetricsEndpoint(Reading, 0, "192.0.2.1")


# --- a model's


def test_a_running_model_is_scraped(sharded: Any) -> None:
    before = sharded.telemetry.counters.num_steps
    with sharded.telemetry.serve(0) as first, sharded.telemetry.serve(0) as second:
        sharded(IDS)
        with ThreadPoolExecutor(4) as pool:
            pages = list(pool.map(scrape, [first, second] * 4))
    for page in pages:
        assert page["lingualinked_up"] == 1
        assert page["lingualinked_steps_total prefill"] + page["lingualinked_steps_total decode"] == before + 1
        assert page["lingualinked_stage_layers b 1"] == 2
        assert page["lingualinked_worker_threads c"] == 1


def test_endpoints_end_with_the_model_and_the_last_reference(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 4)])
    telemetry = model.telemetry
    with ThreadPoolExecutor(4) as pool:
        endpoints = list(pool.map(lambda _: telemetry.serve(0), range(4)))
    model.close()
    assert all(endpoint.closed for endpoint in endpoints)
    assert not any(is_listening(endpoint.port) for endpoint in endpoints)
    for later in (telemetry, model.telemetry):
        with pytest.raises(ll.ClosedError):
            later.serve(0)
    assert "lingualinked_steps_total" in telemetry.prometheus()


def test_an_endpoint_keeps_no_model_alive(shared_cluster: ll.Cluster, tiny_llama: str) -> None:
    model: Any = ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan="even", progress=False)
    telemetry = model.telemetry
    endpoint = telemetry.serve(0)
    assert scrape(endpoint)["lingualinked_up"] == 1
    del model
    gc.collect()
    assert endpoint.closed
    with pytest.raises(ll.ClosedError):
        telemetry.serve(0)


def test_an_endpoint_ends_with_the_cluster_and_outlives_a_worker(tiny_llama: str) -> None:
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "ab"]) as cluster:
        model: Any = ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan="even", progress=False)
        endpoint = model.telemetry.serve(0)
        model(IDS)
        assert scrape(endpoint)["lingualinked_stage_layers a 0"] == 2
        os.kill(cluster.pids["b"], signal.SIGKILL)
        wait_until(lambda: scrape(endpoint)["lingualinked_up"] == 0)
        known = scrape(endpoint)  # what was known last
        assert known["lingualinked_stage_layers b 1"] == 2
        assert known["lingualinked_steps_total prefill"] == 1
    assert endpoint.closed
    with pytest.raises(ll.ClosedError):
        model.telemetry.serve(0)


def test_a_copy_of_a_telemetry_is_plain_data(sharded: Any) -> None:
    telemetry = sharded.telemetry
    again = copy.deepcopy(telemetry)
    assert again == telemetry
    assert list(telemetry.to_dict()) == ["stages", "workers", "history"]
    assert "live" not in repr(telemetry)
    for of_none in (again, ll.Telemetry(stages=(), workers=())):
        with pytest.raises(ll.ClosedError, match="the model of this telemetry is not running"):
            of_none.serve(0)

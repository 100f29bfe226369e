from __future__ import annotations

import re
from typing import Any

import pytest

import lingualinked as ll
from lingualinked.cluster.ray.ray_placement import Demand


def test_resources_become_a_bundle_options_of_the_actor_and_of_its_daemon() -> None:
    demand = Demand.of({"CPU": 4, "GPU": 1, "memory": "2GiB", "fast_disk": 0.5})
    assert demand.bundle() == {"CPU": 4, "GPU": 1, "memory": 2 << 30, "fast_disk": 0.5}
    assert demand.options() == {"num_cpus": 4, "num_gpus": 1, "memory": 2 << 30, "resources": {"fast_disk": 0.5}}
    assert demand.daemon_options() == ["--threads", "4", "--accelerator", "cuda:0", "--memory", str(2 << 30)]


def test_one_thread_of_a_processor_is_the_least() -> None:
    demand = Demand.of(None)
    assert demand.bundle() == {"CPU": 1}
    assert demand.options() == {"num_cpus": 1, "num_gpus": 0, "memory": None, "resources": {}}
    assert demand.daemon_options() == ["--threads", "1", "--accelerator", "cpu"]


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"CPU": 0}, "CPU=0"),
        ({"CPU": 0.5}, "CPU=0.5"),
        ({"GPU": 2}, "GPU=2"),
        ({"GPU": 0.5}, "GPU=0.5"),
        ({"memory": "much"}, "memory in resources='much'"),
        ({"fast_disk": -1}, "resources has fast_disk=-1"),
        (["CPU"], "resources=['CPU']"),
    ],
)
def test_what_ray_can_not_be_asked_for_is_named(resources: Any, message: str) -> None:
    with pytest.raises(ll.ArgumentError, match=re.escape(message)):
        Demand.of(resources)

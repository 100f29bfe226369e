"""How devices share the free memory of the processor or GPU that they compute on."""

from __future__ import annotations

from typing import Any

import lingualinked as ll
from lingualinked.cluster.measuring.profiling import share_of_memory


def shares(free_bytes: int, *devices: dict[str, Any]) -> list[int]:
    made = [ll.Device(name=str(index), **each) for index, each in enumerate(devices)]
    return [share_of_memory(device, made, free_bytes) for device in made]


def test_without_limits_all_get_the_same() -> None:
    assert shares(100, {}, {}) == [50, 50]


def test_what_limits_leave_is_for_those_without() -> None:
    assert shares(100, {"memory": 30}, {}, {}) == [100, 35, 35]
    assert shares(100, {"memory": 30}, {"memory": 50}, {}) == [50, 70, 20]
    assert shares(100, {"memory": 130}, {}) == [100, 0]


def test_limits_that_exceed_the_memory_shrink_alike() -> None:
    assert shares(100, {"memory": 100}, {"memory": 300}) == [25, 75]


def test_each_gpu_has_its_own_memory() -> None:
    first, second = {"accelerator": "cuda:0"}, {"accelerator": "cuda:1", "memory": 40}
    assert shares(100, first, second, first, {}) == [50, 100, 50, 100]

"""The demo shows sharding where it is needed: on devices of which none holds the bundled model alone."""

from __future__ import annotations

import dataclasses

import pytest

import lingualinked as ll
from lingualinked.cli.demo_command import _memory_of_each
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.describing import describe
from profiles import profile


@pytest.fixture(scope="module")
def model() -> ll.ModelProfile:
    return describe(LoadArguments.of(ll.sample_model())).footprint().profile


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
def test_every_device_of_the_demo_is_needed(model: ll.ModelProfile, num_devices: int) -> None:
    memory = _memory_of_each(model, num_devices)
    devices = [ll.Device(name=f"worker-{index}", memory=memory) for index in range(num_devices)]
    made = dataclasses.replace(profile(*devices), model=model)
    assert len(ll.solve(made).devices) == num_devices


def test_the_devices_of_the_first_session_are_needed(model: ll.ModelProfile) -> None:
    devices = [ll.Device(name=name, memory="3MiB") for name in "abc"]
    assert len(ll.solve(dataclasses.replace(profile(*devices), model=model)).devices) == 3

"""Accelerators of this machine, as far as they can be known without loading torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import lingualinked as ll
from lingualinked.processes import accelerators
from lingualinked.processes.accelerators import check_accelerator, local_devices


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Linux machine on which torch can't be imported; gives the folder of its device files."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(accelerators, "_DEVICE_FILES", tmp_path)
    return tmp_path


def gpu(accelerator: str) -> ll.Device:
    return ll.Device(name="gpu", accelerator=accelerator)


def test_a_machine_without_accelerators_has_two_workers(no_torch: Path) -> None:
    assert [device.accelerator for device in local_devices()] == ["cpu", "cpu"]


def test_each_gpu_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [(device.name, device.accelerator, device.memory) for device in local_devices()] == [
        ("cuda-0", "cuda:0", None),  # all that is free there
        ("cuda-1", "cuda:1", None),
    ]


@pytest.mark.parametrize("accelerator", ["cuda:0", "mps"])
def test_what_has_no_device_file_is_not_there(no_torch: Path, accelerator: str) -> None:
    with pytest.raises(
        ll.ArgumentError, match=f"accelerator='{accelerator}' of device 'gpu': .* no accelerator of that"
    ):
        check_accelerator(gpu(accelerator))
    check_accelerator(gpu("cpu"))


def test_there_are_at_most_as_many_as_device_files(no_torch: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (no_torch / name).touch()
    check_accelerator(gpu("cuda:1"))
    with pytest.raises(ll.ArgumentError, match="this machine has 2 accelerators of that kind"):
        check_accelerator(gpu("cuda:2"))


@pytest.mark.parametrize("name", ["dxg", "kfd", "nvmap"])
def test_accelerators_that_are_not_counted_there_are_left_to_the_workers(no_torch: Path, name: str) -> None:
    (no_torch / name).touch()
    check_accelerator(gpu("cuda:3"))

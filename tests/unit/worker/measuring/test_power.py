"""A worker's power is the machine's energy by the worker's share of the work; where nothing counts it, the reason is kept."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from lingualinked.worker.measuring.power import NvmlCounter, PowerMeter, RaplCounter, UnknownPowerError, find_counter

RANGE_UJ = 262_143_328_850


class Machine:
    """A folder like /sys/class/powercap, and the clocks of a machine on which one worker computes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own_s = self.all_s = self.now_s = 0.0

    def zone(self, number: str, name: str, energy_uj: int = 1_000_000) -> None:
        zone = self.folder / f"intel-rapl:{number}"
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (zone / "energy_uj").write_text(f"{energy_uj}\n")

    def use(self, number: str, joules: float) -> None:
        path = self.folder / f"intel-rapl:{number}" / "energy_uj"
        path.write_text(f"{(int(path.read_text()) + round(joules * 1e6)) % RANGE_UJ}\n")

    def compute(self, seconds: float, share: float = 1.0) -> None:
        self.now_s += seconds
        self.all_s += seconds
        self.own_s += share * seconds

    def counter(self) -> RaplCounter:
        return RaplCounter(self.folder, lambda: (self.own_s, self.all_s))

    def meter(self) -> PowerMeter:
        return PowerMeter(self.counter(), lambda: self.now_s)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "powercap")


def two_packages(machine: Machine) -> Machine:
    for package in "01":
        machine.zone(package, f"package-{package}")
        machine.zone(f"{package}:0", "core")
        machine.zone(f"{package}:1", "uncore")
        machine.zone(f"{package}:2", "dram")
    machine.zone("2", "psys")
    return machine


def test_packages_and_memory_count_once_and_nothing_within_them(machine: Machine) -> None:
    counter = two_packages(machine).counter()
    counter.start()
    for number, joules in {"0": 10, "0:0": 7, "0:1": 2, "0:2": 3, "1": 20, "1:0": 9, "1:2": 4, "2": 50}.items():
        machine.use(number, joules)
    machine.compute(2.0)
    assert counter.stop() == pytest.approx(10 + 3 + 20 + 4)


def test_a_counter_that_has_reached_its_range_begins_at_0(machine: Machine) -> None:
    machine.zone("0", "package-0", energy_uj=RANGE_UJ - 1_000_000)
    counter = machine.counter()
    counter.start()
    machine.use("0", 5)
    machine.compute(1.0)
    assert counter.stop() == pytest.approx(5)


def test_workers_of_one_machine_share_its_energy_by_their_cpu_time(machine: Machine) -> None:
    machine.zone("0", "package-0")
    seconds = {"a": 0.0, "b": 0.0, "others": 0.0}
    counters = [RaplCounter(machine.folder, lambda name=name: (seconds[name], sum(seconds.values()))) for name in "ab"]  # type: ignore[misc]
    for counter in counters:
        counter.start()
    seconds.update(a=3.0, b=1.0, others=4.0)
    machine.use("0", 80)
    assert [counter.stop() for counter in counters] == pytest.approx([30, 10])


def test_power_is_energy_over_the_seconds_that_were_measured(machine: Machine) -> None:
    machine.zone("0", "package-0")
    meter = machine.meter()
    for _ in range(2):
        with meter.measure():
            machine.use("0", 30)
            machine.compute(1.5)
        machine.use("0", 1000)  # loading weights, which is no computing
        machine.compute(9.0)
    assert meter.result() == (20.0, "RAPL, by share of CPU time")


def test_the_machines_clock_may_be_coarser_than_a_process_has(machine: Machine) -> None:
    machine.zone("0", "package-0")
    counter = machine.counter()
    for own_s, all_s in ((0.004, 0.0), (0.014, 0.01)):
        counter.start()
        machine.use("0", 8)
        machine.own_s += own_s
        machine.all_s += all_s
        assert counter.stop() == pytest.approx(8)


def test_why_there_is_no_counter_is_said(machine: Machine) -> None:
    absent = find_counter("cpu", machine.folder)
    machine.zone("0", "psys")
    (machine.folder / "intel-rapl").mkdir()
    for found in (absent, find_counter("cpu", machine.folder)):
        assert isinstance(found, UnknownPowerError)
        assert f"{machine.folder} lists no processor package" in str(found)
    assert "no energy counter for mps" in str(find_counter("mps"))


def test_a_counter_that_can_not_be_read_is_named_at_once_or_later(machine: Machine) -> None:
    machine.zone("0", "package-0")
    path = machine.folder / "intel-rapl:0" / "energy_uj"
    meter = machine.meter()
    with meter.measure():
        machine.use("0", 30)
        machine.compute(1.0)
        path.unlink()
        path.mkdir()  # what even root can't read
    with meter.measure():
        machine.compute(1.0)
    for watts, why in (meter.result(), (None, str(find_counter("cpu", machine.folder)))):
        assert watts is None
        assert f"{path} can't be read" in why
        assert "only root" in why


def test_an_error_of_what_is_measured_passes(machine: Machine) -> None:
    machine.zone("0", "package-0")
    meter = machine.meter()
    with pytest.raises(ZeroDivisionError), meter.measure():
        raise ZeroDivisionError
    assert meter.result() == (None, "RAPL, by share of CPU time has counted no energy")


class FakeNVMLError(Exception):
    """What the library raises."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, read_mj: Any) -> list[str]:
    uuids: list[str] = []
    library = types.SimpleNamespace(
        NVMLError=FakeNVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=uuids.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: read_mj(),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="12-34"))
    return uuids


def test_a_gpu_counts_its_own_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1000, 2000, 9500])
    uuids = fake_nvml(monkeypatch, lambda: next(readings))
    counter = NvmlCounter("cuda:0")
    counter.start()
    assert counter.stop() == 7.5
    assert uuids == ["GPU-12-34"]


def test_a_gpu_that_does_not_count_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise FakeNVMLError("Not Supported")

    fake_nvml(monkeypatch, refuse)
    assert "NVML: Not Supported" in str(find_counter("cuda:0"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'lingualinked[nvml]'" in str(find_counter("cuda:0"))

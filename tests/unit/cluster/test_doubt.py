"""What makes measured times doubtful: repeats that lie far apart, and other processes that kept the machine busy."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import lingualinked as ll
from lingualinked.cluster.measuring import doubt
from lingualinked.cluster.measuring.doubt import OtherWork, find_doubt
from lingualinked.module_times import ModuleTimes
from lingualinked.profile import DeviceProfile, Profile
from profiles import profile


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)


def with_spread(made: Profile, name: str, share: float, *, is_decode: bool) -> list[DeviceProfile]:
    def spread(times: ModuleTimes) -> ModuleTimes:
        return ModuleTimes(
            tuple(
                dataclasses.replace(step, spread_s=share * step.seconds if (step.tokens == 1) == is_decode else 0.0)
                for step in times.steps
            )
        )

    return [
        each
        if each.device.name != name
        else dataclasses.replace(each, layers=tuple(map(spread, each.layers)), stage=spread(each.stage))
        for each in made.devices
    ]


@pytest.mark.parametrize("is_decode", [True, False])
def test_repeats_that_lie_far_apart(four_cores: None, is_decode: bool) -> None:
    made = profile(ll.Device(name="a", threads=1), ll.Device(name="b", threads=1))
    assert find_doubt(made.model, with_spread(made, "b", 0.4, is_decode=is_decode), made.names, 0.0) == ""
    found = find_doubt(made.model, with_spread(made, "b", 0.9, is_decode=is_decode), made.names, 0.0)
    phase = "decode step" if is_decode else "prefill"
    share = {True: 84, False: 90}[is_decode]  # the prologue and the epilogue do not spread: 90 % of 16.2 in 17.3 ms
    assert found == f"the repeats of a {phase} on device 'b' spread by {share} %"


def test_devices_that_are_alike_are_named_in_one_sentence(four_cores: None) -> None:
    made = profile(ll.Device(name="a", threads=1), ll.Device(name="b", threads=1))
    both = dataclasses.replace(made, devices=tuple(with_spread(made, "a", 0.9, is_decode=False)))
    found = find_doubt(made.model, with_spread(both, "b", 0.9, is_decode=False), both.names, 0.0)
    assert found == "the repeats of a prefill on devices 'a', 'b' spread by 90 %"


def test_a_spread_of_microseconds_does_not_matter(four_cores: None) -> None:
    made = profile(ll.Device(name="a", threads=1), layer_s=1e-5)
    assert find_doubt(made.model, with_spread(made, "a", 0.9, is_decode=True), made.names, 0.0) == ""


@pytest.mark.parametrize(
    ("threads", "other_cores", "is_doubtful"),
    [
        (1, 0.2, False),
        (1, 2.2, False),
        (1, 2.4, True),
        (2, 0.2, False),
        (2, 0.4, True),
        (4, 0.2, False),
        (4, 0.4, True),
    ],
)
def test_other_processes_matter_where_they_leave_too_few_cores(
    four_cores: None, threads: int, other_cores: float, is_doubtful: bool
) -> None:
    made = profile(ll.Device(name="a", threads=threads), ll.Device(name="b", threads=threads))
    expected = f"other processes kept {other_cores} of 4 cores busy" if is_doubtful else ""
    assert find_doubt(made.model, made.devices, made.names, other_cores) == expected


def test_what_others_compute_is_what_the_machine_did_beyond_this_process_and_its_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 2 s the machine computes 7 s; this process 1 s, a worker 2.5 s, and another one has ended."""
    now_s = {"all": 100.0, os.getpid(): 10.0, 7: 20.0}
    clock = iter([50.0, 52.0])

    class Process:
        def __init__(self, pid: int) -> None:
            if pid not in now_s:
                raise psutil.NoSuchProcess(pid)
            self._pid = pid

        def cpu_times(self) -> Any:
            return SimpleNamespace(user=now_s[self._pid] - 1, system=1.0)

    def all_cpus() -> Any:
        return SimpleNamespace(user=now_s["all"] - 6, nice=1.0, system=2.0, idle=1e6, iowait=1e6, steal=3.0)

    monkeypatch.setattr(doubt.psutil, "Process", Process)
    monkeypatch.setattr(doubt.psutil, "cpu_times", all_cpus)
    monkeypatch.setattr(doubt.time, "monotonic", lambda: next(clock))
    with OtherWork([7, 8]) as others:
        now_s.update({"all": 107.0, os.getpid(): 11.0, 7: 22.5})
    assert others.num_cores == pytest.approx((7 - 1 - 2.5) / 2)

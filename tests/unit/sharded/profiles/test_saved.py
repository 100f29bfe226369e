"""What is kept of a device on another host is found again by what that computes with, wherever it is reached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import lingualinked as ll
from lingualinked.disk_cache import write_cached
from lingualinked.environment import Environment
from lingualinked.sharded.profiles import saved
from lingualinked.versions import Versions
from profiles import profile

FOOTPRINT: Any = SimpleNamespace(profile=profile().model)
WORKLOAD = ll.Workload()
NAS = Environment(
    host="nas",
    host_id="0",
    machine="0",
    versions=Versions(lingualinked="0.1.0", torch="2.13.0", transformers="5.23.0", python="3.12.3"),
    processor="EPYC",
    cpu_capability="AVX2",
    accelerator="",
    threads=2,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def device(address: str = "tcp://10.0.0.5:5600", **fields: Any) -> ll.Device:
    return ll.Device(name="nas", address=address, **fields)


def keep(environment: Environment) -> None:
    name = saved._name("profile", [device()], {}, FOOTPRINT, WORKLOAD, {"nas": environment})
    write_cached(name, profile(device()).to_json())


def find(asked: ll.Device, environment: Environment) -> ll.Profile | None:
    return saved.saved_profile([asked], {}, FOOTPRINT, WORKLOAD, {"nas": environment})


def test_a_host_that_moved_or_started_anew_is_known_again() -> None:
    keep(NAS)
    moved = device("tcp://10.0.0.77:5601", advertise="nas.example")
    found = find(moved, msgspec.structs.replace(NAS, host_id="1", machine="1"))
    assert found is not None
    assert found.device("nas").device == moved, "it is reached where it is now"


@pytest.mark.parametrize(
    "changed",
    [
        {"host": "other"},
        {"processor": "Xeon"},
        {"cpu_capability": "AVX512"},
        {"threads": 4},
        {"versions": NAS.versions._replace(torch="2.12.0")},
    ],
)
def test_another_host_is_measured_anew(changed: dict[str, Any]) -> None:
    keep(NAS)
    assert find(device(), NAS) is not None
    assert find(device(), msgspec.structs.replace(NAS, **changed)) is None


def test_what_the_device_states_still_counts() -> None:
    keep(NAS)
    assert find(device(memory="1GiB"), NAS) is None

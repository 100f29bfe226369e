"""A cluster file says what devices and links there are, and is refused by name where it can't be used."""

from __future__ import annotations

from pathlib import Path

import pytest

import lingualinked as ll
from lingualinked.cli.cluster_file import read_cluster_file, read_devices

GOOD = """
[[devices]]
name = "desktop"
memory = "8GiB"
cpus = [0, 1]
flops = "2TFLOP/s"
memory_bandwidth = "50GB/s"

[[devices]]
name = "phone"
slowdown = 4.0
bandwidth = "100Mbit/s"
trusted = true

[[links]]
source = "desktop"
target = "phone"
bandwidth = "1Gbit/s"
latency = "1ms"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cluster.toml"


def test_devices_links_and_figures_are_read(path: Path) -> None:
    path.write_text(GOOD)
    read = read_cluster_file(path)
    assert read.devices == (
        ll.Device(name="desktop", memory="8GiB", cpus=(0, 1)),
        ll.Device(name="phone", slowdown=4.0, bandwidth="100Mbit/s", trusted=True),
    )
    assert read.links == {("desktop", "phone"): ll.Link(bandwidth="1Gbit/s", latency="1ms")}
    assert read.specs == {"desktop": ll.DeviceSpecs(flops=2e12, memory_bandwidth=5e10)} or (
        read.specs["desktop"].flops_per_s,
        read.specs["desktop"].memory_bytes_per_s,
    ) == (2e12, 5e10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has no \[\[devices\]\]"),
        ("devices = 3", r"has no \[\[devices\]\]"),
        ("devices = [", "no cluster file at"),
        ("colour = 1", "has 'colour', which is not one of devices, links"),
        ("[[devices]]\nmemory = '1GiB'", "has no name"),
        ("[[devices]]\nname = 'a'\nspeed = 3", "has 'speed', which is not one of name"),
        ("[[devices]]\nname = 'a'\nmemory = 'much'", "memory of device 'a'='much'"),
        ("[[devices]]\nname = 'a'\nbandwidth = -1", "bandwidth of device 'a'=-1"),
        ("[[devices]]\nname = 'a'\n[[devices]]\nname = 'a'", "two devices named 'a'"),
        ("[[devices]]\nname = 'a'\nflops = 3", "states flops but not memory_bandwidth"),
        ("[[devices]]\nname = 'a'\nflops = 'fast'\nmemory_bandwidth = 1", "flops='fast'"),
        ("[[devices]]\nname = 'a'\n[[links]]\nsource = 'a'\ntarget = 'b'", "no device 'b'"),
        ("[[devices]]\nname = 'a'\n[[links]]\nsource = 'a'\ntarget = 'caller'\nbandwidth = 0", "bandwidth of a link"),
        ("links = 3\n[[devices]]\nname = 'a'", r"must be \[\[links\]\] tables"),
        (
            "[[devices]]\nname = 'a'\n[[links]]\nsource = ['a']\ntarget = 'caller'",
            "must name a source and a target device",
        ),
        ("[[devices]]\nname = 'a'" + "\n[[links]]\nsource = 'a'\ntarget = 'caller'" * 2, "two links from 'a'"),
    ],
)
def test_what_can_not_be_used_is_named(path: Path, content: str, message: str) -> None:
    path.write_text(content)
    with pytest.raises(ll.ArgumentError, match=message):
        read_cluster_file(path)


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(ll.ArgumentError, match="no cluster file at"):
        read_cluster_file(path)


def test_a_number_of_workers_or_a_file(path: Path) -> None:
    assert [device.name for device in read_devices("2").devices] == ["worker-0", "worker-1"]
    path.write_text(GOOD)
    assert read_devices(str(path)) == read_cluster_file(path)

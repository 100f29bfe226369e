"""A cluster file says what devices and links there are, is refused by name where it can't be used, and can be written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from zmq.utils import z85

import lingualinked as ll
from lingualinked.cli.devices_option import read_devices
from lingualinked.cluster.workers.devices import describe_cluster
from lingualinked.cluster_file import ClusterDescription, read_cluster_file, read_description
from lingualinked.cluster_file_writer import write_cluster_file

KEY = z85.encode(bytes(range(32))).decode()
GOOD = f"""
advertise = "10.0.0.2"
timeout_s = 30

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

[[devices]]
name = "nas"
address = "tcp://NAS.lan:5600"
server_key = "{KEY}"
key = "laptop"
advertise = "203.0.113.7:5601-5699"

[[links]]
source = "desktop"
target = "phone"
bandwidth = "1Gbit/s"
latency = "1ms"
relay = "nas"
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
        ll.Device(
            name="nas",
            address="tcp://nas.lan:5600",
            server_key=KEY,
            key="laptop",
            advertise="203.0.113.7:5601-5699",
        ),
    )
    assert read.links == {("desktop", "phone"): ll.Link(bandwidth="1Gbit/s", latency="1ms", relay="nas")}
    assert read.specs == {"desktop": ll.DeviceSpecs(flops="2TFLOP/s", memory_bandwidth="50GB/s")}
    assert (read.advertise, read.timeout_s) == ("10.0.0.2", 30)


A = "[[devices]]\nname = 'a'\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"^PATH has no \[\[devices\]\]"),
        ("devices = 3", r"^devices of PATH must be \[\[devices\]\] tables"),
        ("devices = [3]", r"^devices of PATH must be \[\[devices\]\] tables"),
        ("devices = [", "^no cluster file at 'PATH'"),
        ("colour = 1", "^PATH has an unknown field 'colour': it may have devices, links, advertise, timeout_s$"),
        ("device = 1", "^PATH has an unknown field 'device': did you mean 'devices'"),
        ("timeout_s = 'long'", "^PATH: timeout_s='long' must be"),
        ("advertise = '0.0.0.0'", "^PATH: advertise='0.0.0.0' "),
        ("[[devices]]\nmemory = '1GiB'", r"^\[\[devices\]\] table 1 of PATH has no name"),
        ("[[devices]]\nname = 3", r"^\[\[devices\]\] table 1 of PATH: name=3 must be"),
        (
            f"{A}adress = 3",
            r"^\[\[devices\]\] table 1 \('a'\) of PATH has an unknown field 'adress': did you mean 'address'",
        ),
        (f"{A}speed = 3", "unknown field 'speed': it may have name"),
        (f"{A}memory = 'much'", r"^\[\[devices\]\] table 1 \('a'\) of PATH: memory of device 'a'='much'"),
        (f"{A}memory = [1]", r"memory of device 'a'=\(1,\)"),
        (f"{A}bandwidth = -1", "bandwidth of device 'a'=-1"),
        (f"{A}trusted = 1", "trusted=1 of device 'a'"),
        (f"{A}threads = 1979-05-27", "threads=datetime"),
        (f"{A}server_key = '{KEY}'", "server_key=.* only a device with an address"),
        (f"{A}{A}", r"^\[\[devices\]\] table 2 \('a'\) of PATH: two devices are named 'a'"),
        (
            f"{A}address = 'tcp://nas:1'\n[[devices]]\nname = 'b'\naddress = 'tcp://NAS:1'",
            r"^\[\[devices\]\] table 2 \('b'\) of PATH: devices 'a' and 'b' have one address, tcp://nas:1",
        ),
        (f"{A}flops = 3", "states flops but not memory_bandwidth"),
        (f"{A}flops = 'fast'\nmemory_bandwidth = 1", r"table 1 \('a'\) of PATH: flops='fast'"),
        (f"{A}flops = [1]\nmemory_bandwidth = 1", r"flops=\[1\]"),
        (f"{A}[[links]]\nsource = 'a'\ntarget = 'b'", "^PATH: links has .*no device 'b'"),
        (f"{A}[[links]]\nsource = 'a'\ntarget = 'caller'\nrelay = 'b'", "^PATH: relay='b' of the link"),
        (
            f"{A}[[links]]\nsource = 'a'\ntarget = 'caller'\nrelay = 1",
            r"^\[\[links\]\] table 1 of PATH: relay=1 of a link",
        ),
        (f"{A}[[links]]\nsource = 'a'\ntarget = 'caller'\nbandwidth = 0", "of PATH: bandwidth of a link"),
        (f"{A}[[links]]\nfrom = 'a'", r"^\[\[links\]\] table 1 of PATH has an unknown field 'from'"),
        (f"links = 3\n{A}", r"^links of PATH must be \[\[links\]\] tables"),
        (f"{A}[[links]]\nsource = ['a']\ntarget = 'caller'", "of PATH must name a source and a target device"),
        (
            A + "[[links]]\nsource = 'a'\ntarget = 'caller'\n" * 2,
            "table 2 of PATH is a second link from 'a' to 'caller'",
        ),
    ],
)
def test_what_can_not_be_used_is_named(path: Path, content: str, message: str) -> None:
    path.write_text(content)
    with pytest.raises(ll.ArgumentError, match=message.replace("PATH", str(path))):
        read_cluster_file(path)


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(ll.ArgumentError, match="no cluster file at"):
        read_description(str(path))
    with pytest.raises(ll.ArgumentError, match="'atuo' is neither 'auto', nor a cluster file"):
        read_description("atuo")
    with pytest.raises(ll.ArgumentError, match=r"no cluster file at '.*': .*Is a directory"):
        read_description(path.parent)


def test_what_devices_can_be(path: Path) -> None:
    path.write_text(A)
    (path.parent / "mine").write_text(A)
    read = describe_cluster(path)
    assert read.devices[0].threads
    assert [describe_cluster(each) for each in (str(path), path.parent / "mine", str(path.parent / "mine"), read)] == [
        read
    ] * 4
    assert [device.name for device in describe_cluster(2).devices] == ["worker-0", "worker-1"]
    assert read_devices("2") == describe_cluster(2)
    assert read_devices(str(path)) == read
    assert len(describe_cluster("auto").devices) >= 1


@pytest.mark.parametrize("devices", [0, -1, True, 1.5, None, b"ab", [], "", ["a"], [None], {}])
def test_what_devices_can_not_be(devices: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=r"^devices"):
        describe_cluster(devices)


def test_daemons_by_their_addresses() -> None:
    one = describe_cluster(f"tcp://NAS:5600#{KEY}")
    assert one.devices == (ll.Device(name="nas", address="tcp://nas:5600", server_key=KEY),)
    several = describe_cluster(f" tcp://10.0.0.5:5600#{KEY},tcp://10.0.0.5:5601 tcp://[fe80::1]:1\n")
    assert [(device.name, device.server_key) for device in several.devices] == [
        ("10.0.0.5", KEY),
        ("10.0.0.5:5601", None),
        ("fe80::1", None),
    ]
    assert describe_cluster("tcp://caller:5600").devices[0].name == "caller:5600"
    for text, error in (("tcp://nas", "devices='tcp://nas'"), ("tcp://nas:1#", "server_key of device 'nas'=''")):
        with pytest.raises(ll.ArgumentError, match=error):
            describe_cluster(text)


def test_a_file_is_written_once_with_comments(path: Path) -> None:
    written = ClusterDescription(devices=(ll.Device(name="nas", address="tcp://nas:5600"),))
    write_cluster_file(path, written, comments={"nas": ["key SHA256:abc"]}, head=["found today"])
    assert path.read_text() == (
        '# found today\n\n[[devices]]\nname = "nas"\naddress = "tcp://nas:5600"\n# key SHA256:abc\n'
    )
    with pytest.raises(ll.ArgumentError, match="already, which is not overwritten"):
        write_cluster_file(path, written)
    write_cluster_file(path, written, replace=True)
    assert read_cluster_file(path) == written
    with pytest.raises(ll.ArgumentError, match="no cluster file can be written to"):
        write_cluster_file(path / "under", written)


NAMES = st.text(min_size=1, max_size=8).filter(
    lambda name: name == name.strip() and name.isprintable() and name != "caller"
)
RATES = st.floats(1e-3, 1e12) | st.integers(1, 10**12) | st.sampled_from(["100Mbit/s", "1.5GB/s"])
LATENCIES = st.floats(0, 1e3) | st.sampled_from(["3ms", "250 µs", 0])
LOCAL = st.fixed_dictionaries(
    {},
    optional={
        "threads": st.integers(1, 999),
        "cpus": st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(tuple),
        "slowdown": st.floats(1, 100),
        "memory": st.integers(1, 2**63) | st.sampled_from(["2GiB", "1.5 GB"]),
        "bandwidth": RATES,
        "latency": LATENCIES,
        "watts": st.floats(0.1, 1e3),
        "trusted": st.booleans(),
    },
)
REMOTE = st.fixed_dictionaries(
    {"address": st.integers(1, 65535).map("tcp://[fe80::1%eth0]:{}".format)},
    optional={
        "accelerator": st.sampled_from(["cpu", "cuda:1"]),
        "server_key": st.binary(min_size=32, max_size=32).map(lambda raw: z85.encode(raw).decode()),
        "key": st.sampled_from(["laptop", "a.b-c_d"]),
        "advertise": st.sampled_from(["nas.lan", "10.0.0.5:1-65535", "[::5]:7"]),
    },
)


@st.composite
def descriptions(draw: st.DrawFn) -> ClusterDescription:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    devices = [ll.Device(name=name, **draw(LOCAL | REMOTE)) for name in names]
    addresses = {device.address for device in devices if device.address}
    if len(addresses) < sum(device.address is not None for device in devices):
        devices, names = devices[:1], names[:1]
    ends = draw(st.lists(st.permutations(["caller", *names]).map(lambda drawn: (drawn[0], drawn[1])), max_size=3))
    link = st.builds(ll.Link, bandwidth=st.none() | RATES, latency=LATENCIES)
    specs = st.builds(ll.DeviceSpecs, flops=st.sampled_from([2e12, "2TFLOP/s", 3]), memory_bandwidth=RATES)
    return ClusterDescription(
        devices=tuple(devices),
        links={each: draw(link) for each in ends},
        specs={name: draw(specs) for name in names if draw(st.booleans())},
        advertise=draw(st.sampled_from([None, "10.0.0.2", "[::1]:5-6"])),
        timeout_s=draw(st.none() | st.floats(0.1, math.floor(1e6)) | st.integers(1, 999)),
    )


@given(written=descriptions())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, written: ClusterDescription) -> None:
    path = tmp_path_factory.getbasetemp() / "written.toml"
    write_cluster_file(path, written, comments={each.name: ["[[devices]]"] for each in written.devices}, replace=True)
    assert read_cluster_file(path) == written


def test_the_file_of_the_documentation_is_read(path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")
    path.write_text(page.split("```toml\n")[1].split("```")[0])
    read = read_cluster_file(path)
    assert [device.name for device in read.devices] == ["nas", "office", "here", "here-gateway"]
    assert read.links["nas", "office"].relay == "here-gateway"

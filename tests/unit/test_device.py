"""A device is plain data that refuses what can't be used, by the field's name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, strategies as st
from zmq.utils import z85

import lingualinked as ll
from lingualinked.device import check_links, link_between
from lingualinked.public_key import fingerprint, raw_key
from lingualinked.units import parse_bytes, parse_rate, parse_seconds

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


@pytest.mark.parametrize(
    ("amount", "number_of_bytes"),
    [
        (1, 1),
        ("17", 17),
        ("512MiB", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        (" 2 gib ", 2**31),
        ("0.1GiB", 107_374_182),
    ],
)
def test_amounts_of_memory(amount: int | str, number_of_bytes: int) -> None:
    assert parse_bytes(amount) == number_of_bytes


@given(number=st.integers(1, 10**30), unit=st.sampled_from(sorted(UNITS)), blank=st.sampled_from(["", " "]))
def test_whole_numbers_are_exact_in_every_unit(number: int, unit: str, blank: str) -> None:
    assert parse_bytes(f"{number}{blank}{unit}") == number * UNITS[unit]


@given(text=st.text(max_size=12) | st.from_regex(r"[0-9.]{0,6} ?[KMGTkmgt]?[iI]?[bB]?", fullmatch=True))
def test_any_text_is_an_amount_or_refused_by_name(text: str) -> None:
    try:
        parsed = parse_bytes(text, "budget")
    except ll.ArgumentError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert parsed > 0
    assert not refusal or refusal.startswith(f"budget={text!r} ")


@pytest.mark.parametrize("amount", ["", "iB", "2G", "-1", "1e9", "٣GiB", "0", "0.4", 0, -5, True, 1.5, None])
def test_what_is_no_amount_of_memory(amount: Any) -> None:
    with pytest.raises(ll.ArgumentError, match="memory="):
        parse_bytes(amount)


def test_a_device_keeps_what_it_is_given() -> None:
    device = ll.Device(name="a", accelerator="cuda:1", threads=3, cpus=[0, 2], memory="2GiB")  # type: ignore[arg-type]
    assert (device.cpus, device.memory, device.memory_bytes) == ((0, 2), "2GiB", 2**31)
    assert ll.Device(name="b").memory_bytes is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        device.threads = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("name", value) for value in ("", " a", "a\n", "caller", None, 3)],
        *[("accelerator", value) for value in ("gpu", "cuda", "cuda:x", "", None)],
        *[("threads", value) for value in (0, -1, 1.5, True, "2")],
        *[("cpus", value) for value in ((), (-1,), ("0",), (0, 0), (True,), 3, "01")],
        *[("memory", value) for value in ("much", 0, -1, 1.5, True, 2**64, 10**400)],
    ],
)
def test_what_a_device_can_not_be(field: str, value: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=field):
        ll.Device(**{"name": "a", field: value})


@pytest.mark.parametrize(
    ("rate", "bytes_per_s"),
    [
        (5, 5.0),
        (2.5, 2.5),
        ("100Mbit/s", 12.5e6),
        ("1 Gbit/s", 125e6),
        ("12.5MB/s", 12.5e6),
        ("8bps", 1.0),
        ("3B/s", 3.0),
    ],
)
def test_bandwidths(rate: float | str, bytes_per_s: float) -> None:
    assert parse_rate(rate) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    ("duration", "seconds"), [(0, 0.0), (0.5, 0.5), ("3ms", 3e-3), ("250us", 250e-6), ("250 µs", 250e-6), ("2s", 2.0)]
)
def test_durations(duration: float | str, seconds: float) -> None:
    assert parse_seconds(duration) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slowdown", 0.5),
        ("slowdown", float("nan")),
        ("slowdown", "2"),
        ("slowdown", 10**400),
        ("bandwidth", 0),
        ("bandwidth", -1.0),
        ("bandwidth", "fast"),
        ("bandwidth", float("nan")),
        ("latency", -1),
        ("latency", "3"),
        ("latency", "٣ms"),
        ("latency", 10**400),
        ("latency", float("inf")),
        ("watts", 0),
        ("watts", float("nan")),
        ("trusted", 1),
    ],
)
def test_what_can_not_be_emulated_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=f"{field}.*of device 'a'"):
        ll.Device(name="a", **{field: value})


def test_an_accelerator_is_not_slowed() -> None:
    with pytest.raises(ll.ArgumentError, match="only a CPU worker can emulate"):
        ll.Device(name="a", accelerator="cuda:0", slowdown=2.0)


def test_a_link_has_the_smaller_bandwidth_and_the_sum_of_latencies_unless_given() -> None:
    fast = ll.Device(name="fast", bandwidth="1Gbit/s", latency="1ms")
    slow = ll.Device(name="slow", bandwidth="10Mbit/s", latency="5ms")
    link = link_between(fast, slow, {})
    assert link.bandwidth_bytes_per_s == pytest.approx(1.25e6)
    assert link.latency_s == pytest.approx(6e-3)
    to_caller = link_between(slow, None, {})
    assert (to_caller.bandwidth_bytes_per_s, to_caller.latency_s) == (slow.bandwidth_bytes_per_s, slow.latency_s)
    given = ll.Link(bandwidth="2Gbit/s", latency=0)
    assert link_between(fast, slow, {("fast", "slow"): given}) is given
    assert link_between(slow, fast, {("fast", "slow"): given}) != given


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([], "links is a list"),
        ({("a", "b"): 3}, "give .source, target. names and a lingualinked.Link"),
        ({"ab": ll.Link()}, "give .source, target. names"),
        ({("a", "moon"): ll.Link()}, "there is no device 'moon'"),
        ({("a", "a"): ll.Link()}, "connects two different devices"),
    ],
)
def test_links_that_lead_nowhere_are_refused(links: Any, message: str) -> None:
    with pytest.raises(ll.ArgumentError, match=message):
        check_links(links, ["a", "b"])


@pytest.mark.parametrize("arguments", [{"bandwidth": 0}, {"bandwidth": "x"}, {"latency": -1}, {"latency": "x"}])
def test_a_link_refuses_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ll.ArgumentError, match=f"{next(iter(arguments))} of a link"):
        ll.Link(**arguments)


KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # of ZeroMQ's own examples


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        ("tcp://10.0.0.5:5600", "tcp://10.0.0.5:5600"),
        ("tcp://NAS.lan.:5600", "tcp://nas.lan:5600"),
        ("tcp://[2001:DB8:0::1]:1", "tcp://[2001:db8::1]:1"),
        ("tcp://[fe80::1%eth0]:65535", "tcp://[fe80::1%eth0]:65535"),
        ("tcp://my_box-2:80", "tcp://my_box-2:80"),
    ],
)
def test_equal_addresses_are_written_alike(address: str, canonical: str) -> None:
    assert ll.Device(name="nas", address=address).address == canonical


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.5:5600",
        "tcp://10.0.0.5",
        "tcp://10.0.0.5:",
        "tcp://10.0.0.5:0",
        "tcp://10.0.0.5:65536",
        "tcp://10.0.0.5:56-57",
        "tcp://10.0.0:5600",
        "tcp://10.0.0.256:5600",
        "tcp://fe80::1:5600",
        "tcp://[fe80::1:5600",
        "tcp://[10.0.0.5]:5600",
        "tcp://0.0.0.0:5600",
        "tcp://[::]:5600",
        "tcp://*:5600",
        "tcp://:5600",
        "tcp://a b:5600",
        "tcp://-nas:5600",
        "tcp://user@nas:5600",
        "ipc:///tmp/x",
        "",
        5600,
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=r"^address of device 'nas'="):
        ll.Device(name="nas", address=address)


@pytest.mark.parametrize("advertise", ["nas", "10.0.0.5:5", "[FE80::1]:5601-5699"])
def test_what_others_can_reach_is_a_host_with_or_without_ports(advertise: str) -> None:
    assert ll.Device(name="nas", address="tcp://nas:5600", advertise=advertise).advertise == advertise


@pytest.mark.parametrize(
    "advertise", ["", "0.0.0.0", "nas:0", "nas:5-4", "nas:", "[::]:5", "a b", "tcp://nas:5", "fe80::1", 5]
)
def test_what_others_can_not_reach_is_refused(advertise: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=r"^advertise of device 'nas'="):
        ll.Device(name="nas", address="tcp://nas:5600", advertise=advertise)


@pytest.mark.parametrize(
    ("field", "value"), [("server_key", KEY), ("key", "laptop"), ("advertise", "nas.lan"), ("advertise", 5)]
)
def test_a_local_device_has_nothing_of_a_remote_one(field: str, value: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=rf"^{field}=.*only a device with an address"):
        ll.Device(name="nas", **{field: value})


def test_a_remote_device_is_not_pinned_from_here() -> None:
    with pytest.raises(ll.ArgumentError, match=r"^cpus=.*only a local worker"):
        ll.Device(name="nas", address="tcp://nas:5600", cpus=(0,))


@pytest.mark.parametrize("server_key", [KEY[:-1], KEY + "7", KEY[:-1] + "~", "%nSc0" * 8 + " ", "#####" * 8, b"x" * 40])
def test_a_server_key_is_a_public_key(server_key: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=r"^server_key of device 'nas'=.* is not a public key"):
        ll.Device(name="nas", address="tcp://nas:5600", server_key=server_key)


@pytest.mark.parametrize("key", ["", ".hidden", "../up", "a/b", "x.pub", "a" * 65, 3])
def test_a_key_has_the_name_of_a_file(key: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=r"^key of device 'nas'="):
        ll.Device(name="nas", address="tcp://nas:5600", key=key)


@given(raw=st.binary(min_size=32, max_size=32))
def test_every_key_of_zeromq_is_read_as_zeromq_reads_it(raw: bytes) -> None:
    assert raw_key(z85.encode(raw).decode()) == raw
    assert fingerprint(z85.encode(raw).decode()).startswith("SHA256:")


@pytest.mark.parametrize("relay", ["a", "b", "d", "caller"])
def test_a_relay_is_a_third_device(relay: str) -> None:
    assert check_links({("a", "b"): ll.Link(relay="c")}, "abc")
    with pytest.raises(ll.ArgumentError, match=rf"relay='{relay}' .* choose from \['c'\]"):
        check_links({("a", "b"): ll.Link(relay=relay)}, "abc")

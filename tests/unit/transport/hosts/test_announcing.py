"""What a daemon announces is read back as it was, and what anybody else announces does no harm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from lingualinked.transport.hosts.announcing import Announcement, _service_of, read_announcement

GOOD = {
    "name": "nas",
    "address": "tcp://10.0.0.5:5600",
    "hardware": "Ryzen 7, 8 cores, 15.5 GiB",
    "fingerprint": "SHA256:TyHnXrKZ9wUkQdn41PTFCakoIcSzKlsFAh8C7UE+9kk",
}


@given(name=st.text(min_size=1).filter(lambda name: name == name.strip() and name.isprintable() and name != "caller"))
def test_what_is_announced_is_read(name: str) -> None:
    service = _service_of(Announcement(**{**GOOD, "name": name}))
    label = service.name.removesuffix("._lingualinked._tcp.local.")
    assert 0 < len(label.encode()) <= 63
    assert "." not in label
    read = read_announcement(dict(service.decoded_properties))
    assert read is None or read.name == name[: len(read.name)]
    assert read is not None or len(name.encode()) > 200  # cut within, or behind a blank


@pytest.mark.parametrize("address", ["tcp://nas.lan:5600", "tcp://[fe80::1%eth0]:5600", "tcp://10.0.0.5:5600"])
def test_addresses_of_every_kind_are_announced(address: str) -> None:
    service = _service_of(Announcement(**{**GOOD, "address": address}))
    assert read_announcement(dict(service.decoded_properties)) == Announcement(**{**GOOD, "address": address})


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("name", None),
        ("name", ""),
        ("name", "a\x1b[2J"),
        ("name", "caller"),
        ("name", "a\nb"),
        ("address", "tcp://0.0.0.0:5600"),
        ("address", "ipc:///etc"),
        ("hardware", "fast\nserver_key = 'mine'"),
        ("hardware", "\u202egnp"),
        ("hardware", None),
        ("fingerprint", "SHA256:short"),
        ("fingerprint", "SHA256:" + "a" * 43 + "\n"),
    ],
)
def test_what_could_mislead_is_left_out(field: str, text: str | None) -> None:
    assert read_announcement(GOOD) == Announcement(**GOOD)
    assert read_announcement({**GOOD, field: text}) is None


@given(st.dictionaries(st.sampled_from([*GOOD, "other"]), st.none() | st.text() | st.just(GOOD["address"])))
def test_no_announcement_raises(properties: dict[str, Any]) -> None:
    read_announcement(properties)

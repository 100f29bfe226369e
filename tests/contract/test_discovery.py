"""A daemon that announces itself is found by another process on the same interface, until it stops."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lingualinked as ll
from lingualinked.address import Address
from lingualinked.public_key import fingerprint
from lingualinked.transport.hosts.announcing import Announcement, Announcer, find_announced
from lingualinked.transport.keys.keys import generate_keypair

LOOPBACK = "127.0.0.1"
ATTEMPTS = 6

ANNOUNCER = f"""
import sys
from lingualinked.address import Address
from lingualinked.transport.hosts.announcing import Announcer
announcer = Announcer(
    name=sys.argv[1], address=Address("nas.lan", 5600), hardware="8 cores", public_key=sys.argv[2], interface="{LOOPBACK}"
)
announcer.start()
print("announced", flush=True)
sys.stdin.read()
announcer.stop()
"""


def found_of(name: str, *, is_there: bool) -> list[Announcement]:
    """Look until a daemon is there or is not, a few times at most: answers are rarer than questions."""
    found: list[Announcement] = []
    for _ in range(ATTEMPTS):
        found = [each for each in find_announced(1.0, LOOPBACK) if each.name == name]
        if bool(found) == is_there:
            break
    return found


def test_a_process_finds_another_ones_announcement_until_that_ends() -> None:
    public_key = generate_keypair().public
    name = f"nas {public_key[:8]}"  # tests may run beside each other
    with subprocess.Popen(
        [sys.executable, "-c", ANNOUNCER, name, public_key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "announced\n"
        (found,) = found_of(name, is_there=True)
        assert found.address == "tcp://nas.lan:5600"
        assert found.hardware == "8 cores"
        assert found.fingerprint == fingerprint(public_key)
        process.stdin.close()
    assert process.returncode == 0
    assert found_of(name, is_there=False) == []


def test_an_interface_that_is_not_there_is_named() -> None:
    public_key = generate_keypair().public
    announcer = Announcer(
        name="nas", address=Address("nas.lan", 1), hardware="", public_key=public_key, interface="192.0.2.255"
    )
    with pytest.raises(ll.ArgumentError, match=r"no interface .* '192.0.2.255': choose from .*'127.0.0.1'"):
        announcer.start()
    announcer.stop()
    with pytest.raises(ll.ArgumentError, match=r"no interface of this machine has the address"):
        find_announced(0.1, "192.0.2.255")


def test_without_zeroconf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(ll.ArgumentError, match=r"pip install 'lingualinked\[discovery\]'"):
        find_announced(0.1)

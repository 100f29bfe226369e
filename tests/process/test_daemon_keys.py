"""Keys between people: a client is authorised, trusts a daemon, and is revoked, while the daemon runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from daemons import DaemonProcess
from lingualinked.public_key import fingerprint
from lingualinked.transport.hosts.announcing import Announcement, find_announced
from lingualinked.transport.keys.key_files import make_key
from lingualinked.transport.keys.key_lists import hosts_path, trust_daemon
from lingualinked.transport.keys.keys import generate_keypair

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "mine"))
    return tmp_path


@pytest.fixture
def daemon(home: Path) -> Iterator[DaemonProcess]:
    """A daemon of another user, who has authorised nobody."""
    with DaemonProcess(home / "theirs", "", "--name", "nas", "--threads", "1") as daemon:
        yield daemon.wait_until_it_listens()


def keys_there(home: Path, *arguments: str) -> None:
    """Run ``lingualinked keys`` as the user of the daemon."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home / "theirs" / "config")}
    command = "import sys; from lingualinked.cli import app; app(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", command, "keys", *arguments], env=environment, check=True)


def test_a_running_daemon_lets_in_who_is_authorised_and_ends_what_is_revoked(
    daemon: DaemonProcess, home: Path, tiny_llama: str, unsharded: Any
) -> None:
    mine = make_key("default")
    # 1) nobody is known to anybody
    with pytest.raises(ll.ArgumentError, match=r"key of the daemon .*is not known.*lingualinked keys trust"):
        ll.Cluster(daemon.address)
    trust_daemon(daemon.address, daemon.server_key)
    with pytest.raises(ll.DaemonError, match=r"does not let in our key 'default'.*keys authorize '") as refusal:
        ll.Cluster(daemon.address)
    assert mine.public in str(refusal.value)
    # 2) what the error says lets it in
    keys_there(home, "authorize", mine.public, "--name", "anna")
    daemon.wait_for_log("now lets in anna")
    path = home / "cluster.toml"
    path.write_text(f"[[devices]]\nname = 'nas'\naddress = '{daemon.address}'\n")
    with ll.ShardedModel.from_pretrained(tiny_llama, devices=path, plan="even", progress=False) as model:
        assert torch.equal(
            model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0),
            unsharded.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0),
        )
        # 3) revoking ends what it has there
        keys_there(home, "revoke", "anna")
        daemon.wait_for_log("now lets in nobody")
        with pytest.raises(ll.WorkerDiedError, match="nas"):
            model(IDS)
    daemon.wait_until_idle()
    with pytest.raises(ll.DaemonError, match="does not let in our key"):
        ll.Cluster(f"{daemon.address}#{daemon.server_key}")


def test_a_daemon_that_does_not_hold_the_known_key_is_loud(daemon: DaemonProcess) -> None:
    make_key("default")
    other = generate_keypair().public
    trust_daemon(daemon.address, other)
    expected = rf"it does not hold the key {fingerprint(other)} of line 1 of {hosts_path()}".replace("+", "[+]")
    with pytest.raises(ll.DaemonError, match=expected):
        ll.Cluster(daemon.address)
    assert not daemon.workers()


def test_a_daemon_that_announces_itself_is_found_and_not_trusted(home: Path) -> None:
    with DaemonProcess(home / "theirs", "", "--name", "nas", "--announce") as daemon:
        daemon.wait_until_it_listens()
        found: list[Announcement] = []
        for _ in range(10):
            found = [each for each in find_announced(1.0, "127.0.0.1") if each.address == daemon.address]
            if found:
                break
        assert [(each.name, each.fingerprint) for each in found] == [("nas", fingerprint(daemon.server_key))]
        with pytest.raises(ll.ArgumentError, match="is not known"):
            ll.Cluster(found[0].address)

"""``lingualinked discover`` shows what was found, says what is known, and trusts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lingualinked as ll
from lingualinked.cli import discover_command
from lingualinked.cli.app import app
from lingualinked.cluster_file import read_cluster_file
from lingualinked.public_key import fingerprint
from lingualinked.transport.hosts.announcing import Announcement
from lingualinked.transport.keys.key_lists import trust_daemon
from lingualinked.transport.keys.keys import generate_keypair

KEY, OTHER = generate_keypair().public, generate_keypair().public


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def discover(monkeypatch: pytest.MonkeyPatch, found: list[Announcement], *arguments: str) -> Any:
    monkeypatch.setattr(discover_command, "find_announced", lambda seconds, interface: tuple(found))
    return CliRunner().invoke(app, ["discover", *arguments])


def announced(host: str, key: str = KEY, name: str = "nas") -> Announcement:
    return Announcement(name=name, address=f"tcp://{host}:5600", hardware="8 cores", fingerprint=fingerprint(key))


def test_a_cluster_file_has_keys_only_of_known_daemons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_daemon("tcp://10.0.0.5:5600", KEY)
    path = folder / "cluster.toml"
    result = discover(monkeypatch, [announced("10.0.0.5"), announced("10.0.0.6", OTHER)], "--write", str(path))
    assert result.exit_code == 0
    assert "known, line 1 of" in result.stdout
    assert "lingualinked keys trust tcp://10.0.0.6:5600 PUBKEY" in result.stdout
    assert read_cluster_file(path).devices == (
        ll.Device(name="nas", address="tcp://10.0.0.5:5600", server_key=KEY),
        ll.Device(name="nas-2", address="tcp://10.0.0.6:5600"),
    )
    assert f"# announces the key {fingerprint(OTHER)}: not known to you" in path.read_text()
    again = discover(monkeypatch, [announced("10.0.0.5")], "--write", str(path))
    assert (again.exit_code, "not overwritten" in again.stderr) == (1, True)


def test_a_key_that_differs_is_loud_and_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_daemon("tcp://10.0.0.5:5600", KEY)
    path = folder / "cluster.toml"
    found = [announced("10.0.0.5", OTHER), announced("10.0.0.5", KEY, "true")]
    result = discover(monkeypatch, found, "--write", str(path))
    assert f"NOT THE KEY that you know: line 1 of {folder}" in result.stdout
    assert [device.server_key for device in read_cluster_file(path).devices] == [KEY]


def test_nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    result = discover(monkeypatch, [], "--seconds", "1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "No daemon announced itself within 1 s" in result.stderr

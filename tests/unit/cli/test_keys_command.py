"""``lingualinked keys``, as two people use it who want one's model on the other's machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lingualinked.cli.app import app
from lingualinked.public_key import fingerprint
from lingualinked.transport.keys.key_files import find_client_keys, find_daemon_keys
from lingualinked.transport.keys.key_lists import AuthorizedClients, known_hosts


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["keys", *arguments])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "lingualinked" / "keys"


def test_what_new_prints_authorises(folder: Path) -> None:
    made = run("new")
    keys = find_client_keys(None)
    assert fingerprint(keys.public) in made.stdout
    assert keys.secret not in made.stdout
    command = shlex.split(made.stdout.splitlines()[-1])
    assert command[:2] == ["lingualinked", "keys"]
    assert run(*command[2:]).exit_code == 0
    name = AuthorizedClients().names[keys.public]
    assert run("revoke", name).stdout == f"Revoked {name!r}: {fingerprint(keys.public)}\n"
    assert run("authorize", str(folder / "default.pub")).stdout.startswith(f"Authorised {name!r}: SHA256:")


def test_a_key_that_looks_like_an_option_is_a_key() -> None:
    key = "-n" + find_daemon_keys().public[2:]
    assert run("authorize", key, "--name", "anna").exit_code == 0
    assert AuthorizedClients().names == {key: "anna"}
    assert run("revoke", key).exit_code == 0


def test_list_shows_what_can_be_copied_and_compared(folder: Path) -> None:
    assert [line.endswith(": none") for line in run("list").stdout.splitlines()] == [True] * 3
    run("new", "laptop")
    public = find_client_keys("laptop").public
    run("authorize", public, "--name", "anna")
    assert run("trust", "tcp://NAS:5600", public).exit_code == 0
    shown = run("list").stdout
    for name in ("laptop", "anna", "tcp://nas:5600"):
        assert f"  {name}  {fingerprint(public)}  {public}\n" in shown
    assert run("revoke", "tcp://nas:5600").exit_code == 0
    assert not known_hosts()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("new", "../daemon"), "key='../daemon' must be the name of a key"),
        (("authorize", "short"), "'short' is not a public key"),
        (("authorize", ""), "'' is not a public key"),
        (("authorize", "missing.pub"), "no public key can be read from 'missing.pub'"),
        (("revoke", "nobody"), "has no client 'nobody'"),
        (("revoke", "tcp://nas"), "address='tcp://nas' is not the address of a daemon"),
        (("trust", "nas", "short"), "address='nas' is not the address of a daemon"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_message(arguments: tuple[str, ...], error: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert error in result.stderr

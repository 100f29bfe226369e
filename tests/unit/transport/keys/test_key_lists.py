"""Authorised clients and known daemons, in text files that people edit too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import lingualinked as ll
from lingualinked.public_key import fingerprint
from lingualinked.transport.keys.key_lists import (
    AuthorizedClients,
    authorize_client,
    clients_path,
    find_server_key,
    forget_daemon,
    hosts_path,
    known_hosts,
    revoke_client,
    trust_daemon,
    wrong_server_key,
)
from lingualinked.transport.keys.keys import generate_keypair

KEYS: Sequence[str] = [generate_keypair().public for _ in range(3)]
ADDRESS = "tcp://nas:5600"
NAS = ll.Device(name="nas", address=ADDRESS)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "lingualinked"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)


def test_a_running_daemon_honours_what_is_authorised_and_revoked() -> None:
    clients = AuthorizedClients()
    assert not clients.names
    assert not clients.refresh()
    assert authorize_client(KEYS[0], "anna") == "anna"
    authorize_client(KEYS[1])
    assert clients.refresh()
    assert not clients.refresh()
    assert clients.names[KEYS[0]] == "anna"
    assert clients.names[KEYS[1]].startswith("client-")
    assert revoke_client("anna") == KEYS[0]
    assert revoke_client(KEYS[1]) == KEYS[1]
    assert clients.refresh()
    assert not clients.names


def test_a_client_has_one_key_and_one_name() -> None:
    authorize_client(KEYS[0], "anna")
    with pytest.raises(ll.ArgumentError, match=r"is authorised already, as 'anna' in .*authorized_clients"):
        authorize_client(KEYS[0], "bob")
    with pytest.raises(ll.ArgumentError, match=r"'anna' with another key .* --name, or revoke it first"):
        authorize_client(KEYS[1], "anna")
    with pytest.raises(ll.ArgumentError, match=r"has no client 'bob': it has \['anna'\]"):
        revoke_client("bob")
    with pytest.raises(ll.ArgumentError, match=r"name='a b' of a client"):
        authorize_client(KEYS[1], "a b")
    with pytest.raises(ll.ArgumentError, match="not a public key"):
        authorize_client("short", "carl")


def test_comments_survive() -> None:
    write(clients_path(), f"# who may use it\n\n{KEYS[0]} anna\n#{KEYS[1]} carl\n{KEYS[2]}  bob the builder ")
    assert AuthorizedClients().names == {KEYS[0]: "anna", KEYS[2]: "bob the builder"}
    authorize_client(KEYS[1], "dora")
    revoke_client("anna")
    assert clients_path().read_text() == (
        f"# who may use it\n\n#{KEYS[1]} carl\n{KEYS[2]}  bob the builder \n{KEYS[1]} dora\n"
    )


def test_a_line_that_can_not_be_read_grants_nothing(caplog: pytest.LogCaptureFixture) -> None:
    write(clients_path(), f"{KEYS[0]} anna\n")
    clients = AuthorizedClients()
    write(clients_path(), f"{KEYS[0]} anna\n{KEYS[1][:-1]} bob\n{KEYS[2]} carl\n")
    with pytest.raises(ll.ArgumentError, match=r"line 2 of .*authorized_clients does not begin with a public key"):
        AuthorizedClients()
    assert clients.refresh()
    assert clients.names == {KEYS[0]: "anna", KEYS[2]: "carl"}
    assert "line 2" in caplog.text


def test_a_list_that_others_can_change_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    write(clients_path(), f"{KEYS[0]} anna\n")
    clients = AuthorizedClients()
    write(clients_path(), f"{KEYS[0]} anna\n{KEYS[1]} eve\n")
    clients_path().chmod(0o620)
    assert not clients.refresh()
    assert clients.names == {KEYS[0]: "anna"}
    assert "others can change" in caplog.text
    with pytest.raises(ll.ArgumentError, match=r"others can change .*authorized_clients \(mode 0620\)"):
        AuthorizedClients()


def test_a_daemon_is_trusted_once_and_forgotten() -> None:
    assert trust_daemon("tcp://NAS:5600", KEYS[0]) == ADDRESS
    trust_daemon(ADDRESS, KEYS[0])
    assert hosts_path().read_text() == f"{ADDRESS} {KEYS[0]}\n"
    assert find_server_key(NAS) == KEYS[0]
    with pytest.raises(ll.ArgumentError, match=r"line 1 of .*known_hosts says .* another key, SHA256:"):
        trust_daemon(ADDRESS, KEYS[1])
    assert forget_daemon(ADDRESS) == KEYS[0]
    with pytest.raises(ll.ArgumentError, match=r"known_hosts has no daemon at tcp://nas:5600: it has \[\]"):
        forget_daemon(ADDRESS)


def test_an_unknown_daemon_names_both_remedies() -> None:
    with pytest.raises(
        ll.ArgumentError, match=r"tcp://nas:5600 \(device 'nas'\) is not known.*keys trust .*server_key="
    ):
        find_server_key(NAS)
    assert find_server_key(ll.Device(name="nas", address=ADDRESS, server_key=KEYS[1])) == KEYS[1]


def test_a_wrong_key_is_as_loud_as_sshs() -> None:
    write(hosts_path(), f"# mine\n{ADDRESS} {KEYS[0]}\n")
    message = wrong_server_key(NAS)
    assert f"it does not hold the key {fingerprint(KEYS[0])} of line 2 of {hosts_path()}" in message
    assert "lingualinked keys revoke tcp://nas:5600" in message
    stated = ll.Device(name="nas", address=ADDRESS, server_key=KEYS[1])
    assert f"{fingerprint(KEYS[1])} of server_key=" in wrong_server_key(stated)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nas:5600 KEY0\n", r"^line 1 of .*known_hosts='nas:5600' is not the address of a daemon"),
        ("\ntcp://nas:5600 short\n", r"^line 2 of .*known_hosts='short' is not a public key"),
        ("tcp://nas:5600\n", r"^line 1 of .*known_hosts='' is not a public key"),
        ("tcp://nas:5600 KEY0\ntcp://NAS:5600 KEY1\n", r"^lines 1 and 2 of .* two keys for tcp://nas:5600"),
    ],
)
def test_a_wrong_line_of_known_hosts_is_named(text: str, error: str) -> None:
    write(hosts_path(), text.replace("KEY0", KEYS[0]).replace("KEY1", KEYS[1]))
    with pytest.raises(ll.ArgumentError, match=error):
        known_hosts()

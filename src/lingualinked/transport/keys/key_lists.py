"""The clients that may use this user's daemon, and the daemons that this user knows: lists in text files.

Knows public keys, names and addresses; no sockets. A line that can't be read grants nothing, and is named.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from lingualinked.address import parse_address
from lingualinked.device import Device
from lingualinked.errors import ArgumentError
from lingualinked.public_key import fingerprint, is_public_key, raw_key
from lingualinked.transport.keys.key_files import config_folder, locked_folder, read_safely
from lingualinked.whole_file import write_whole_file

_log = logging.getLogger(__name__)
_Line = tuple[int, str, str]  # number of a line, and its two words


@dataclasses.dataclass(frozen=True, slots=True)
class KnownHost:
    """A daemon whose key this user knows."""

    address: str
    public_key: str
    line: int  # of ``known_hosts``, from 1


def clients_path() -> Path:
    """Return the file that lists who may use this user's daemon."""
    return config_folder() / "authorized_clients"


def hosts_path() -> Path:
    """Return the file that lists the daemons that this user knows."""
    return config_folder() / "known_hosts"


class AuthorizedClients:
    """Who may use this user's daemon, as ``authorized_clients`` says at this moment.

    Raises ArgumentError if a line of the file can't be read, or if others can change the file.
    """

    def __init__(self) -> None:
        self._path = clients_path()
        self._seen = self._signature()
        self._names, mistakes = _parse_clients(read_safely(self._path), self._path)
        if mistakes:
            raise ArgumentError(mistakes[0])

    @property
    def names(self) -> Mapping[str, str]:
        """Names of the clients by their public keys, when the file was last read."""
        return self._names

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether other clients are authorised now.

        A file that others can change, or that can't be read, is reported and leaves all as it was.
        """
        signature = self._signature()
        if signature == self._seen:
            return False
        self._seen = signature
        try:
            names, mistakes = _parse_clients(read_safely(self._path), self._path)
        except ArgumentError as error:
            _log.error("authorised clients stay as they were: %s", error)
            return False
        for mistake in mistakes:
            _log.error("%s", mistake)
        changed, self._names = names != self._names, names
        return changed

    def _signature(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def authorize_client(public_key: str, name: str | None = None) -> str:
    """Let the holder of a key use this user's daemon; return the name, by default one made from the fingerprint."""
    raw_key(public_key)
    name = default_client_name(public_key) if name is None else name
    if not name.isprintable() or not 0 < len(name) <= 64 or " " in name:
        raise ArgumentError(f"name={name!r} of a client must be up to 64 printable characters without blanks")
    path = clients_path()
    with locked_folder():
        text = read_safely(path)
        known, mistakes = _parse_clients(text, path)
        if mistakes:
            raise ArgumentError(mistakes[0])
        if public_key in known:
            raise ArgumentError(
                f"the key {fingerprint(public_key)} is authorised already, as {known[public_key]!r} in {path}"
            )
        if name in known.values():
            raise ArgumentError(
                f"a client named {name!r} with another key is in {path} already: choose another --name, or revoke it first by "
                f"`lingualinked keys revoke {shlex.quote(name)}`"
            )
        _append(path, text, f"{public_key} {name}")
    return name


def revoke_client(name: str) -> str:
    """Take a client, given by its name or public key, off the list; return its public key. Its workers are ended."""
    path = clients_path()
    with locked_folder():
        text = read_safely(path)
        known, _ = _parse_clients(text, path)
        keys = [key for key, known_name in known.items() if name in (key, known_name)]
        if not keys:
            raise ArgumentError(f"{path} has no client {name!r}: it has {sorted(known.values())}")
        _remove(path, text, lambda words: words[0] in keys)
    return keys[0]


def known_hosts() -> dict[str, KnownHost]:
    """Return the daemons that this user knows, by address; raise ArgumentError naming a line that can't be read."""
    path, hosts = hosts_path(), dict[str, KnownHost]()
    for number, address, public_key in _lines(read_safely(path)):
        where = f"line {number} of {path}"
        host = KnownHost(str(parse_address(address, where)), public_key, number)
        raw_key(public_key, where)
        if hosts.setdefault(host.address, host).public_key != public_key:
            raise ArgumentError(
                f"lines {hosts[host.address].line} and {number} of {path} give two keys for {host.address}: delete the wrong one"
            )
    return hosts


def trust_daemon(address: str, public_key: str) -> str:
    """Record the key of the daemon at an address; return the address as it was written."""
    address = str(parse_address(address, "address"))
    raw_key(public_key, "public key")
    path = hosts_path()
    with locked_folder():
        known = known_hosts().get(address)
        if known is not None and known.public_key == public_key:
            return address
        if known is not None:
            raise ArgumentError(
                f"line {known.line} of {path} says that the daemon at {address} has another key, {fingerprint(known.public_key)}: "
                f"if that has changed, forget it first by `lingualinked keys revoke {shlex.quote(address)}`"
            )
        _append(path, read_safely(path), f"{address} {public_key}")
    return address


def forget_daemon(address: str) -> str:
    """Take the daemon at an address off the list of known ones; return the public key that it had there."""
    address = str(parse_address(address, "address"))
    path = hosts_path()
    with locked_folder():
        known = known_hosts().get(address)
        if known is None:
            raise ArgumentError(f"{path} has no daemon at {address}: it has {sorted(known_hosts())}")
        _remove(path, read_safely(path), lambda words: str(parse_address(words[0], "address")) == address)
    return known.public_key


def find_server_key(device: Device) -> str:
    """Return the public key that the daemon of a device must hold, or raise ArgumentError if it is not known."""
    if device.server_key is not None:
        return device.server_key
    assert device.address is not None
    known = known_hosts().get(device.address)
    if known is None:
        raise ArgumentError(
            f"the key of the daemon at {device.address} (device {device.name!r}) is not known: it prints its public key when it "
            f"starts; record that by `lingualinked keys trust {shlex.quote(device.address)} PUBKEY`, or state server_key= of the device"
        )
    return known.public_key


def wrong_server_key(device: Device) -> str:
    """Say of whoever answers at a device's address that it does not hold the key that it must, as loudly as ssh."""
    assert device.address is not None
    if device.server_key is not None:
        expected, remedy = f"{fingerprint(device.server_key)} of server_key=", "change server_key= of the device"
    else:
        known, address = known_hosts().get(device.address), shlex.quote(device.address)
        expected = f"{fingerprint(known.public_key)} of line {known.line} of {hosts_path()}" if known else "that it had"
        remedy = f"run `lingualinked keys revoke {address}` and `lingualinked keys trust {address} PUBKEY`"
    return (
        f"it does not hold the key {expected}. Another machine or program may be answering in its place, so nothing was sent "
        f"to it. If you know that its key has changed, compare the fingerprint there (`lingualinked keys list`) and {remedy}"
    )


def default_client_name(public_key: str) -> str:
    """Return a name for a client that was given none."""
    letters = [letter for letter in fingerprint(public_key).removeprefix("SHA256:") if letter.isalnum()]
    return f"client-{''.join(letters[:8])}"


def _parse_clients(text: str, path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the names of clients by key, and what is wrong with lines that can't be read."""
    names: dict[str, str] = {}
    mistakes: list[str] = []
    for number, public_key, name in _lines(text):
        if is_public_key(public_key):
            names.setdefault(public_key, name or default_client_name(public_key))
        else:
            mistakes.append(
                f"line {number} of {path} does not begin with a public key ({public_key!r}): write PUBKEY NAME"
            )
    return names, mistakes


def _lines(text: str) -> list[_Line]:
    """Return the lines that are neither blank nor comments; no key begins with #, whose value is too large for that."""
    found: list[_Line] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split(maxsplit=1)
        if words and not words[0].startswith("#"):
            found.append((number, words[0], words[1].strip() if len(words) > 1 else ""))
    return found


def _append(path: Path, text: str, line: str) -> None:
    _write(path, f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{line}\n")


def _remove(path: Path, text: str, is_removed: Callable[[tuple[str, str]], bool]) -> None:
    """Write a list again without some of its lines, with all comments."""
    removed = {number for number, *words in _lines(text) if is_removed((words[0], words[1]))}
    kept = [line for number, line in enumerate(text.splitlines(), start=1) if number not in removed]
    _write(path, "".join(f"{line}\n" for line in kept))


def _write(path: Path, text: str) -> None:
    write_whole_file(path, text, mode=0o600)

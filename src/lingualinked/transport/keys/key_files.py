"""Key pairs in files of the user's configuration folder, as ssh keeps its own.

Knows files and their modes; not who may connect where. The files of secret keys are certificates as `zmq.auth` reads them;
it is not used to write them, because it leaves their mode to the umask and overwrites what is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import platform
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

import zmq.auth

from lingualinked.errors import ArgumentError
from lingualinked.public_key import check_key_name
from lingualinked.transport.keys.keys import KeyPair, generate_keypair
from lingualinked.whole_file import write_whole_file

DEFAULT_KEY = "default"
"""Name of the key that a client uses unless it names another."""

DAEMON_KEY = "daemon"
"""Name of the key of this user's daemon."""

_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class _KeyExistsError(ArgumentError):
    """There is a key of that name already."""


def config_folder() -> Path:
    """Return the folder of keys and of lists of keys: ``$XDG_CONFIG_HOME/lingualinked``, by default in ``~/.config``."""
    parent = os.environ.get("XDG_CONFIG_HOME", "")
    if Path(parent).is_absolute():
        return Path(parent) / "lingualinked"
    try:
        return Path.home() / ".config" / "lingualinked"
    except RuntimeError as error:
        raise ArgumentError("keys have no folder: this user has no home folder; set XDG_CONFIG_HOME") from error


def key_path(name: str) -> Path:
    """Return the file of a secret key; the public half lies beside it, with ``.pub`` added."""
    return config_folder() / "keys" / check_key_name(name, "key")


def make_key(name: str) -> KeyPair:
    """Make a key pair and write it to files that only this user can read; raise ArgumentError if there is one of that name."""
    path = key_path(name)
    with locked_folder():
        if path.exists():
            raise _KeyExistsError(
                f"there is a key {name!r} already ({path}), and a key is never overwritten: choose another name, or delete it"
            )
        keys = generate_keypair()
        while not keys.public[0].isalnum():  # a shell's command would take it for an option or a comment
            keys = generate_keypair()
        certificate = f'curve\n    public-key = "{keys.public}"\n    secret-key = "{keys.secret}"\n'
        with _named_errors(path):
            make_private_folder(path.parent)
            write_whole_file(path, certificate, mode=0o600)
            write_whole_file(path.with_name(f"{name}.pub"), f"{keys.public} {client_name(name)}\n", mode=0o600)
    return keys


def client_name(key_name: str) -> str:
    """Return what daemons may call the holder of a key of this user: ``user@host``, with the name of a second key."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.geteuid())
    name = f"{user}@{platform.node() or 'unknown'}" + ("" if key_name == DEFAULT_KEY else f"/{key_name}")
    return re.sub(r"[^\w@./-]", "-", name, flags=re.ASCII)[-64:]


def find_client_keys(name: str | None) -> KeyPair:
    """Read the key pair by which this process is known to daemons; ``None``: the one named ``default``."""
    name = DEFAULT_KEY if name is None else name
    path = key_path(name)
    keys = _read_key(path)
    if keys is None:
        known = sorted(own_keys())
        raise ArgumentError(
            f"there is no key {name!r} ({path}): make it by `lingualinked keys new {name}` and authorise it at the device"
            + (f", or name one of {known} as `Device(key=...)`" if known else "")
        )
    return keys


def find_daemon_keys() -> KeyPair:
    """Read the key pair of this user's daemon; make it if there is none yet."""
    path = key_path(DAEMON_KEY)
    keys = _read_key(path)
    if keys is None:
        with contextlib.suppress(_KeyExistsError):  # another daemon starts at the same time
            return make_key(DAEMON_KEY)
        keys = _read_key(path)
        assert keys is not None
    return keys


def own_keys() -> dict[str, str]:
    """Return the public halves of all key pairs in the folder, by name."""
    found: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError), _named_errors(config_folder() / "keys"):
        for path in sorted((config_folder() / "keys").iterdir()):
            if path.suffix not in (".pub", ".partial"):
                keys = _read_key(path)
                found |= {} if keys is None else {path.name: keys.public}
    return found


def _read_key(path: Path) -> KeyPair | None:
    """Read a certificate; ``None`` if there is no such file."""
    if not read_safely(path, is_secret=True):
        return None
    public, secret = _load_certificate(path)
    try:
        return KeyPair(public.decode(), secret.decode())
    except ValueError as error:
        raise ArgumentError(f"{path} holds no key pair: {error}") from None


def _load_certificate(path: Path) -> tuple[bytes, bytes]:
    public: bytes = b""
    secret: bytes | None = None
    with contextlib.suppress(ValueError):  # it has no public key
        public, secret = zmq.auth.load_certificate(path)
    if secret is None:
        raise ArgumentError(
            f"{path} is not a certificate with a public-key and a secret-key, as `lingualinked keys new` makes it"
        )
    return public, secret


def read_safely(path: Path, *, is_secret: bool = False) -> str:
    """Read a file, which nobody else may write, nor read if it is secret; return "" if there is none."""
    with _named_errors(path):
        try:
            with path.open(encoding="utf-8") as file:
                status = os.fstat(file.fileno())  # of the very file that is read
                forbidden = _BY_OTHERS if is_secret else _WRITABLE_BY_OTHERS
                folder_mode = path.parent.stat().st_mode
                text = file.read()
        except FileNotFoundError:
            return ""
    if status.st_mode & forbidden:
        may = "read" if is_secret else "change"
        raise ArgumentError(_unsafe(path, status.st_mode, may, "600"))
    if folder_mode & _WRITABLE_BY_OTHERS:
        raise ArgumentError(_unsafe(path.parent, folder_mode, "change", "700"))
    if status.st_uid not in (0, os.geteuid()):
        raise ArgumentError(f"{path} belongs to another user (uid {status.st_uid}): it is not used; chown it")
    return text


def _unsafe(path: Path, mode: int, may: str, remedy: str) -> str:
    return (
        f"others can {may} {path} (mode {stat.S_IMODE(mode):04o}), so it is not used: "
        f"chmod {remedy} {shlex.quote(str(path))}"
    )


def make_private_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, unless there is one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for each in (config_folder(), folder):
        each.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def locked_folder() -> Iterator[Path]:
    """Make the configuration folder and keep other processes from changing what is in it."""
    folder = config_folder()
    with _named_errors(folder):
        make_private_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} can't be used for keys: {error}") from error

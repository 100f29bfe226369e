"""Keys in files: made once, read only if they are the user's alone, never shown."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq.auth

import lingualinked as ll
from lingualinked.transport.keys.key_files import (
    client_name,
    config_folder,
    find_client_keys,
    find_daemon_keys,
    key_path,
    make_key,
    own_keys,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "lingualinked"


def test_a_key_is_made_once_and_found_again(folder: Path) -> None:
    made = make_key("laptop")
    assert find_client_keys("laptop") == made
    assert own_keys() == {"laptop": made.public}
    with pytest.raises(ll.ArgumentError, match=r"there is a key 'laptop' already .* never overwritten"):
        make_key("laptop")
    assert find_client_keys("laptop") == made


def test_files_are_the_users_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        make_key("laptop")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert modes == {"lingualinked": 0o700, "keys": 0o700, "laptop": 0o600, "laptop.pub": 0o600}


def test_pyzmq_reads_the_file_of_a_key(folder: Path) -> None:
    made = make_key("laptop")
    assert zmq.auth.load_certificate(folder / "keys" / "laptop") == (made.public.encode(), made.secret.encode())
    assert (folder / "keys" / "laptop.pub").read_text().split() == [made.public, client_name("laptop")]


def test_a_key_can_be_copied_into_a_command() -> None:
    assert all(make_key(f"key{number}").public[0].isalnum() for number in range(40))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
def test_a_secret_that_others_can_use_is_refused(folder: Path, mode: int) -> None:
    make_key("laptop")
    path = folder / "keys" / "laptop"
    path.chmod(mode)
    with pytest.raises(
        ll.ArgumentError, match=re.escape(f"{path} (mode {mode:04o}), so it is not used: chmod 600 {path}")
    ):
        find_client_keys("laptop")


def test_a_folder_that_others_can_change_is_refused(folder: Path) -> None:
    make_key("laptop")
    (folder / "keys").chmod(0o770)
    with pytest.raises(ll.ArgumentError, match=rf"others can change {folder}/keys \(mode 0770\).*chmod 700"):
        find_client_keys("laptop")


def test_a_key_that_is_missing_names_the_remedy(folder: Path) -> None:
    with pytest.raises(ll.ArgumentError, match=r"no key 'default' .*lingualinked keys new default`[^;]*device$"):
        find_client_keys(None)
    make_key("laptop")
    with pytest.raises(ll.ArgumentError, match=r"or name one of \['laptop'\]"):
        find_client_keys(None)


def test_a_daemons_key_is_made_at_its_first_start() -> None:
    assert find_daemon_keys() == find_daemon_keys()
    assert list(own_keys()) == ["daemon"]


@pytest.mark.parametrize(
    "content",
    ["", "public", 'public-key = "x"\n', 'public-key = "x"\nsecret-key = "hidden"\n', b"\xff\xfe", "secret-key=hidden"],
)
def test_a_damaged_file_is_named_and_not_shown(folder: Path, content: str | bytes) -> None:
    make_key("laptop")
    path = folder / "keys" / "laptop"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ll.ArgumentError, match=re.escape(str(path))) as refusal:
        find_client_keys("laptop")
    assert "hidden" not in str(refusal.value)


def test_a_folder_that_can_not_be_made_is_named(folder: Path) -> None:
    folder.parent.write_text("a file")
    with pytest.raises(ll.ArgumentError, match=rf"{folder} can't be used for keys: .*Not a directory|File exists"):
        make_key("laptop")


def test_the_folder_is_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_folder() == tmp_path / ".config" / "lingualinked"
    assert key_path("default").parent == config_folder() / "keys"


def test_daemons_that_start_at_once_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: find_daemon_keys().public, range(8)))) == 1

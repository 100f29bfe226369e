"""What keeps a caller from a worker of a daemon is named, with device, address, cause and remedy; nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lingualinked as ll
from daemons import DaemonProcess, Daemons, running_daemons
from lingualinked.cluster.remote import connection
from lingualinked.transport.keys.key_files import make_key
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.versions import installed_versions

pytestmark = pytest.mark.process

LOCAL = ll.Device(name="here", threads=1)


@pytest.fixture(scope="module")
def daemons(shared_fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with running_daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        make_key("unknown")
        yield daemons


@pytest.fixture(scope="module")
def daemon(daemons: Daemons) -> DaemonProcess:
    return daemons.start("--name", "nas", "--memory", "1GiB")


@pytest.fixture
def refused(daemon: DaemonProcess) -> Iterator[Callable[..., str]]:
    """Make a cluster of a local device and one that is not to be had; return the error's text. Nothing runs afterwards."""

    def make(device: ll.Device, kind: type[ll.LingualinkedError] = ll.DaemonError) -> str:
        with pytest.raises(kind) as caught:
            ll.Cluster([LOCAL, device])
        text = str(caught.value)
        assert device.address is not None
        assert repr(device.name) in text
        assert device.address in text
        return text

    yield make
    daemon.wait_until_idle()


def test_another_key_of_the_server(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    text = refused(daemon.device("a", server_key=generate_keypair().public))
    assert re.search("does not hold the key SHA256:.* of server_key=.*compare", text)


def test_an_unknown_server(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    text = refused(daemon.device("a", server_key=None), ll.ArgumentError)
    assert re.search("key .* is not known.*lingualinked keys trust", text)


def test_an_accelerator_that_is_not_the_daemons(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    text = refused(daemon.device("a", accelerator="cuda:1"), ll.ArgumentError)
    assert "accelerator='cuda:1'" in text
    assert "runs workers on 'cpu': leave it out, or start that with --accelerator cuda:1" in text


def test_a_key_that_is_not_authorised(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    text = refused(daemon.device("a", key="unknown"))
    assert re.search("does not let in our key 'unknown': run `lingualinked keys authorize '.{40}'` there", text)


def test_nobody_listens(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    text = refused(daemon.device("a", address=f"tcp://127.0.0.1:{port}"))
    assert re.search("nothing listens there: see that `lingualinked worker", text)


def test_another_program_listens(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = refused(daemon.device("a", address=f"tcp://127.0.0.1:{other.getsockname()[1]}"))
    assert "showed no key within 2 s: see that it is `lingualinked worker` that listens" in text


def test_a_host_name_that_does_not_exist(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    text = refused(daemon.device("a", address="tcp://no-such-host.invalid:5600"))
    assert re.search(r"'no-such-host.invalid' can't be resolved \(.*write its IP address", text)


def test_another_version(daemon: DaemonProcess, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    other = installed_versions()._replace(lingualinked="0.0.1")
    monkeypatch.setattr(connection, "installed_versions", lambda: other)
    text = refused(daemon.device("a"))
    assert re.search(f"has lingualinked {installed_versions().lingualinked}, and this process has 0.0.1: install", text)


def test_more_memory_than_there_is(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    text = refused(daemon.device("a", memory="2GiB"))
    assert re.search("2.0 GiB is not free: of 1.0 GiB that it may lease, 1.0 GiB are not leased; state a smaller", text)


def test_more_threads_than_it_allows(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    assert "threads=2 are more than the 1 that it allows: state fewer" in refused(daemon.device("a", threads=2))


def test_a_stopped_daemon(daemon: DaemonProcess, refused: Callable[..., str]) -> None:
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        assert "showed no key within 2 s" in refused(daemon.device("a"))
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)


def test_two_devices_of_one_address(daemon: DaemonProcess) -> None:
    with pytest.raises(ll.ArgumentError, match=rf"'a' and 'b' have one address, {daemon.address}: .*leave one"):
        ll.Cluster([daemon.device("a"), daemon.device("b")])


def test_memory_is_shared_out(daemon: DaemonProcess) -> None:
    with ll.Cluster([daemon.device("a", memory="256MiB")]) as first:
        assert first.device("a").memory_bytes == 256 << 20
        with ll.Cluster([daemon.device("b")]) as second:  # all that is left
            assert second.device("b").memory_bytes == 768 << 20
            with pytest.raises(ll.DaemonError, match=r"memory is not free: of 1.0 GiB .* 0 B are not leased"):
                ll.Cluster([daemon.device("c")])
        with ll.Cluster([daemon.device("c", memory="768MiB")]):
            pass


def run_daemon(*arguments: str, home: Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lingualinked.worker", *arguments]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--bind", "tcp://0.0.0.0:0"], 1, "no client is authorised.*lingualinked keys authorize"),
        (
            ["--bind", "tcp://192.0.2.7:5600", "--authorize", "{key}"],
            1,
            "can't listen at tcp://192.0.2.7:5600.*name an IP",
        ),
        (
            ["--bind", "127.0.0.1:5600"],
            1,
            "--bind='127.0.0.1:5600' is not the address of a daemon: write tcp://HOST:PORT",
        ),
        (["--bind", "tcp://no-such-host.invalid:1"], 1, "the host name can't be resolved"),
        (["--bind", "tcp://127.0.0.1:{port}"], 1, "port {port}: in use already"),
        (["--bind", "tcp://127.0.0.1:0", "--authorize", "short"], 1, "--authorize='short' is not a public key"),
        (["--bind", "tcp://127.0.0.1:0", "--ports", "9-2"], 1, "--ports='9-2' is not a range of ports"),
        (["--bind", "tcp://127.0.0.1:0", "--memory", "lots"], 1, "--memory='lots' is not a valid memory size"),
        (["--bind", "tcp://127.0.0.1:0", "--wait", "2"], 1, "--wait 2 has no effect without --once"),
        (
            ["--bind", "tcp://127.0.0.1:0", "--accelerator", "abacus"],
            1,
            "accelerator='abacus' .* must be cpu, cuda:N or mps",
        ),
        (["--bind", "tcp://127.0.0.1:0", "--accelerator", "cuda:99"], 1, "accelerator='cuda:99' .* this machine has"),
        (["--bind", "tcp://127.0.0.1:0", "--once", "--wait", "0"], 3, "nobody came within 0 s"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_daemon_that_can_not_start_says_why(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = {"port": taken.getsockname()[1], "key": generate_keypair().public}
        began_s = time.monotonic()
        ended = run_daemon(*(each.format(**filled) for each in arguments), home=tmp_path)
    assert ended.returncode == status, (ended.stderr, time.monotonic() - began_s)
    assert re.search(words.format(**filled), ended.stderr.replace("\n", " ")), ended.stderr
    assert "Traceback" not in ended.stderr

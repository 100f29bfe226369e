"""What the harness of the network tests claims about itself: counts, captures, cuts, limits, endings."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from network import namespaces
from network.half_open import GREETING, half_open
from network.hosts import Host, Network
from waiting import wait_until

SERVER = """
import socket, sys
server = socket.create_server(("0.0.0.0", 5600), backlog=64)
print('"listening"', flush=True)
while True:
    connection, _ = server.accept()
    num_bytes = 0
    while data := connection.recv(1 << 20):
        num_bytes += len(data)
    print([num_bytes], flush=True)
"""

CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5600))
connection.sendall(sys.argv[2].encode() * int(sys.argv[3]))
"""


def pair(network: Network) -> tuple[Host, Host]:
    return network.add("one"), network.add("two")


def test_bytes_are_counted_and_packets_captured(network: Network) -> None:
    one, two = pair(network)
    server = two.start_python(SERVER)
    assert server.hear() == "listening"
    with network.capture() as capture:
        before = one.traffic()
        one.start_python(CLIENT, two.address, "plaintext.", "100000").process.wait()
        assert server.hear() == [1_000_000]
        sent = one.traffic() - before
    assert 999_000 <= sent.sent_payload_bytes <= 1_010_000  # the few packets without data have shorter headers
    assert capture.num_lost == 0
    assert capture.find(b"plaintext.plaintext.")
    assert not capture.find(b"something else")
    (stream,) = [stream for flow, stream in capture.flows().items() if flow.target_port == 5600]
    assert stream == b"plaintext." * 100_000


def test_a_program_has_folders_of_its_own_and_does_not_see_what_is_hidden(network: Network, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("text")
    one, two = pair(network)
    two.hidden.append(tmp_path)
    look = "import json, os, sys; print(json.dumps([os.environ['HOME'], os.listdir(sys.argv[1])]))"
    assert one.start_python(look, tmp_path).hear() == [str(one.home), ["secret"]]
    assert two.start_python(look, tmp_path).hear() == [str(two.home), []]


def test_a_rate_limit_slows_down(network: Network) -> None:
    one, two = network.add("one", rate="100mbit"), network.add("two")
    server = two.start_python(SERVER)
    assert server.hear() == "listening"
    before = time.monotonic()
    one.start_python(CLIENT, two.address, "plaintext.", "500000").process.wait()
    assert server.hear() == [5_000_000]
    assert time.monotonic() - before > 0.35  # 5 MB take 0.4 s at 12.5 MB/s


@pytest.mark.parametrize(("cut", "mend"), [("cut", "mend"), ("pull_plug", "put_plug")])
def test_a_cut_link_drops_everything_and_a_mended_one_does_not(network: Network, cut: str, mend: str) -> None:
    one, two = pair(network)
    server = two.start_python(SERVER)
    assert server.hear() == "listening"
    getattr(two, cut)()
    with one.socket() as connection:
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.connect((two.address, 5600))
    getattr(two, mend)()
    with one.socket() as connection:
        connection.settimeout(10)
        connection.connect((two.address, 5600))
        connection.sendall(b"back")
    assert server.hear() == [4]


def test_without_a_route_sending_fails_at_once(network: Network) -> None:
    one, two = pair(network)
    one.lose_route(two)
    with one.socket() as connection, pytest.raises(OSError, match="No route to host"):
        connection.connect((two.address, 5600))
    one.find_route(two)
    with one.socket() as connection, pytest.raises(ConnectionRefusedError):
        connection.connect((two.address, 5600))


def test_half_open_connections_are_counted(network: Network) -> None:
    one, two = pair(network)
    assert two.start_python(SERVER).hear() == "listening"
    with half_open(one, two.address, 5600, 50, GREETING) as flood:
        wait_until(lambda: flood.num_open() == 50)
        assert flood.num_refused == 0
    with half_open(one, two.address, 5601, 50) as flood:
        assert flood.num_open() == 0


def test_what_a_program_leaves_behind_is_told_and_ended() -> None:
    if (reason := namespaces.why_unavailable()) is not None:
        pytest.skip(reason)
    network = Network()
    host = network.add("one")
    program = host.start_python(
        "import subprocess; p = subprocess.Popen(['sleep', '600'], start_new_session=True); print([p.pid])"
    )
    (pid,) = program.hear()
    host.left = lambda timeout_s=0.0: Host.left(host, timeout_s)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=r"left running on host one: .*sleep 600"):
        network.close()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not Path(f"/run/netns/{host.namespace}").exists()


def test_what_a_crashed_run_has_left_is_removed(network: Network, tmp_path: Path) -> None:
    crash = (
        "import os, sys; sys.path[:0] = ['tests']; from network.hosts import Network\n"
        "network = Network(); host = network.add('one-pc'); host.start('sleep', '600')\n"
        "print(host.namespace, flush=True); os._exit(1)"
    )
    process = subprocess.run(
        [sys.executable, "-c", crash],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    name = process.stdout.strip()
    wait_until(lambda: namespaces.pids(name) != [] or not Path(f"/run/netns/{name}").exists())
    namespaces.remove_stale()
    assert not Path(f"/run/netns/{name}").exists()
    assert Path(f"/run/netns/{network.switch}").exists()  # that of a living run stays

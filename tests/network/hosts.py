"""Hosts, each in a network namespace of its own, on one Ethernet segment; a test's programs run there.

Knows interfaces, addresses, folders and processes; nothing of lingualinked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from network import namespaces
from network.capture import Capture
from network.namespaces import bridge, ip, ip_json, tc
from processes import Program

_SUBNET = "10.0.0"
_HEADER_BYTES = 66  # of a packet with data: Ethernet 14, IPv4 20, TCP with time stamps 32


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an interface has sent and received so far.

    A packet counts with its headers; on links without a rate limit the kernel passes on packets of up to 64 KiB.
    """

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(
            self.sent_bytes - before.sent_bytes,
            self.sent_packets - before.sent_packets,
            self.received_bytes - before.received_bytes,
            self.received_packets - before.received_packets,
        )

    @property
    def sent_payload_bytes(self) -> int:
        """What was sent, without the headers of packets."""
        return self.sent_bytes - _HEADER_BYTES * self.sent_packets

    @property
    def received_payload_bytes(self) -> int:
        """What was received, without the headers of packets."""
        return self.received_bytes - _HEADER_BYTES * self.received_packets


class Host:
    """One host: an interface ``eth0`` with an address, a loopback interface, and a home folder. Made by `Network.add`."""

    def __init__(self, network: Network, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.namespace = namespaces.new_name(name)
        self.folder = network.folder / name
        self.home = self.folder / "home"
        self._network = network
        self._port = f"to-{name}"  # the bridge's end of its link
        self._programs = contextlib.ExitStack()
        self._num_programs = 0
        self.hidden: list[Path] = []  # folders of this machine that programs started from now on find empty
        self.small: dict[Path, str] = {}  # folders that they find empty and so large (``"4m"``)
        for folder in (self.home, self.folder / "tmp", self.folder / "run"):
            folder.mkdir(parents=True)
        (self.folder / "run").chmod(0o700)

    def connect(self) -> None:
        ip("netns", "add", self.namespace)
        switch = self._network.switch
        ip("link", "add", "eth0", "netns", self.namespace, "type", "veth", "peer", "name", self._port, "netns", switch)
        _disable_ipv6(self.namespace)
        ip("-n", switch, "link", "set", self._port, "master", "br0", "up")
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "link", "set", "eth0", "up")

    @property
    def environment(self) -> dict[str, str]:
        """What a program here is started with: folders of its own, and this process's environment otherwise."""
        home = str(self.home)
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("LINGUALINKED_FORK")},
            "HOME": home,
            "XDG_CONFIG_HOME": f"{home}/.config",
            "XDG_CACHE_HOME": f"{home}/.cache",
            "XDG_DATA_HOME": f"{home}/.local/share",
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "HF_HOME": f"{home}/.cache/huggingface",
            "TMPDIR": str(self.folder / "tmp"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> Program:
        """Start a program here; it is ended with the network, if it has not ended by then."""
        self._num_programs += 1
        folder = self.folder / f"program-{self._num_programs}"
        folder.mkdir()
        hide = 'while [ "$1" != -- ]; do mount -t tmpfs -o "size=$2" none "$1" || exit; shift 2; done; shift; exec "$@"'
        covered = [each for path in self.hidden for each in (path, "4k")]
        covered += [each for path, size in self.small.items() for each in (path, size)]
        return self._programs.enter_context(
            Program(
                # ``ip netns exec`` has given the program a mount namespace of its own.
                ["ip", "netns", "exec", self.namespace, "sh", "-c", hide, "sh", *covered, "--", *command],
                folder,
                cwd=self.home,
                environment={**self.environment, **(environment or {})},
            )
        )

    def start_python(self, code: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> Program:
        """Start a Python script here."""
        path = self.folder / f"script-{self._num_programs + 1}.py"
        path.write_text(code)
        return self.start(sys.executable, path, *arguments, environment=environment)

    def sockets(self, number: int) -> list[socket.socket]:
        """Return so many new TCP sockets of this process that are on this host."""
        return namespaces.inside(self.namespace, lambda: [socket.socket() for _ in range(number)])

    def socket(self) -> socket.socket:
        """Return a new TCP socket of this process that is on this host."""
        (one,) = self.sockets(1)
        return one

    def pids(self) -> list[int]:
        """Return the processes that run here."""
        return namespaces.pids(self.namespace)

    def traffic(self) -> Traffic:
        """Return what ``eth0`` has sent and received so far."""
        (link,) = ip_json("-n", self.namespace, "-s", "link", "show", "eth0")
        sent, received = link["stats64"]["tx"], link["stats64"]["rx"]
        return Traffic(sent["bytes"], sent["packets"], received["bytes"], received["packets"])

    def limit(self, rate: str) -> None:
        """Limit what the host sends and receives to a rate each (``"100mbit"``)."""
        for name, interface in ((self.namespace, "eth0"), (self._network.switch, self._port)):
            tc(
                *("-n", name, "qdisc", "replace", "dev", interface, "root"),
                *("tbf", "rate", rate, "burst", "64kb", "latency", "50ms"),
            )

    def cut(self) -> None:
        """Let the switch drop everything from and to this host; nobody is told."""
        self._set_port_state("0")

    def mend(self) -> None:
        """Undo `cut`."""
        self._set_port_state("3")

    def _set_port_state(self, state: str) -> None:
        bridge("-n", self._network.switch, "link", "set", "dev", self._port, "state", state)

    def pull_plug(self) -> None:
        """Take the link's other end down: the host sees that its interface has no carrier."""
        ip("-n", self._network.switch, "link", "set", self._port, "down")

    def put_plug(self) -> None:
        """Undo `pull_plug`."""
        ip("-n", self._network.switch, "link", "set", self._port, "up")

    def lose_route(self, other: Host) -> None:
        """Forget the way to another host: the system refuses to send there, at once and with an error."""
        ip("-n", self.namespace, "route", "add", "unreachable", f"{other.address}/32")

    def find_route(self, other: Host) -> None:
        """Undo `lose_route`."""
        ip("-n", self.namespace, "route", "del", "unreachable", f"{other.address}/32")

    def end(self) -> None:
        """End the programs that run here, and see that nothing is left of them."""
        try:
            self._programs.close()
            left = self.left()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert not left, f"left running on host {self.name}: {left}"
        finally:
            namespaces.remove(self.namespace)

    def left(self, timeout_s: float = 10.0) -> dict[int, str]:
        """Return the command lines of processes that still run here after a while; at once when none does."""
        deadline = time.monotonic() + timeout_s
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.05)  # an end that is under way tells nobody
        return {pid: _command_line(pid) for pid in left}


class Network:
    """Hosts on one switch, a context manager that removes everything at its end.

    Examples
    --------
    >>> with Network() as network:  # doctest: +SKIP
    ...     one, two = network.add("one"), network.add("two", rate="100mbit")
    """

    def __init__(self) -> None:
        namespaces.remove_stale()
        self.switch = namespaces.new_name("switch")
        self.hosts: list[Host] = []
        self.folder = Path(tempfile.mkdtemp(prefix="net-"))
        try:
            ip("netns", "add", self.switch)
            _disable_ipv6(self.switch)
            ip("-n", self.switch, "link", "add", "br0", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
            ip("-n", self.switch, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise

    def add(self, name: str, *, rate: str | None = None, address: str | None = None) -> Host:
        """Add a host, by a name of up to 12 letters that is its own."""
        host = Host(self, name, f"{_SUBNET}.{len(self.hosts) + 11}" if address is None else address)
        self.hosts.append(host)
        host.connect()
        if rate is not None:
            host.limit(rate)
        return host

    def capture(self) -> Capture:
        """Capture all packets on all interfaces of the hosts and of the switch."""
        return Capture([self.switch, *(host.namespace for host in self.hosts)])

    def close(self) -> None:
        """End all programs, remove all namespaces and folders."""
        with contextlib.ExitStack() as ends:
            ends.callback(shutil.rmtree, self.folder)
            ends.callback(namespaces.remove, self.switch)
            for host in self.hosts:
                ends.callback(host.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return "just gone"


def _disable_ipv6(namespace: str) -> None:
    """Keep a namespace from saying anything of its own accord."""

    def write() -> None:
        for each in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{each}/disable_ipv6").write_text("1")

    with contextlib.suppress(FileNotFoundError):
        namespaces.inside(namespace, write)

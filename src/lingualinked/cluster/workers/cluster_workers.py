"""The workers of one cluster, started here or by daemons on other hosts.

Knows who starts which; not what the workers do. Workers start before the caller has imported torch, so nothing here does.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lingualinked.address import Address, parse_address, parse_advertised
from lingualinked.device import Device, Links
from lingualinked.errors import ArgumentError
from lingualinked.host_id import host_id
from lingualinked.interrupts import uninterrupted
from lingualinked.processes.launch import Launcher
from lingualinked.protocol.boot import Boot
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint

if TYPE_CHECKING:
    from lingualinked.cluster.messaging.reach import RemoteHost
    from lingualinked.cluster.ray.ray_placement import RayPlacement
    from lingualinked.cluster.remote.connection import Lease
    from lingualinked.cluster.remote.remote_workers import RemoteWorkers

_Report = Callable[[str, str], None]


class ClusterWorkers:
    """Starts workers on devices, lets each in once it has made its key, and ends them.

    Nothing starts here for a cluster whose devices are all on other hosts.
    """

    def __init__(
        self, class_names: tuple[str, ...], *, forks: bool | None = None, placement: RayPlacement | None = None
    ) -> None:
        self._links: Links = {}
        self._class_names = class_names
        self._forks = forks
        self.placement = placement  # of devices by Ray
        self.launcher: Launcher | None = None
        self._remote: RemoteWorkers | None = None
        self.leases: dict[str, Lease] = {}  # of devices on other hosts
        self.hosts: dict[str, RemoteHost] = {}  # likewise
        self._boots: dict[str, Boot] = {}  # of workers that have not said their key
        self._authorise: _Report = lambda name, public_key: None
        self._on_end: _Report = lambda name, how: None
        self._has_started = False

    def prepare(self, devices: Sequence[Device], links: Links) -> tuple[Device, ...]:
        """Make ready to start workers on devices; return the devices with what daemons have decided about them.

        ``links`` are all of the cluster's, of which some lead through a relay.

        Raises `ResourceError`, and for devices on other hosts also `DaemonError` and `ArgumentError`.
        """
        self._links = links
        if self.launcher is None and any(device.address is None for device in devices):
            uninterrupted(self._make_launcher)()
        distant = [device for device in devices if device.address is not None]
        if not distant:
            return tuple(devices)
        if self._remote is None:
            import lingualinked.cluster.remote.remote_workers  # noqa: F401 - zmq too, before what an interrupt waits for

            uninterrupted(self._make_remote)()
            assert self._remote is not None
        from lingualinked.cluster.remote.locating import locate  # imports zmq

        for device, lease in zip(distant, self._remote.lease(distant), strict=True):
            self.leases[device.name] = lease
            self.hosts[device.name] = locate(device, lease)
        return tuple(self._as_leased(device) if device.address is not None else device for device in devices)

    def _make_launcher(self) -> None:
        self.launcher = Launcher(self._class_names, forks=self._forks)
        if self._has_started:
            self.launcher.start((), self._admit, self._on_end)

    def _make_remote(self) -> None:
        from lingualinked.cluster.remote.remote_workers import RemoteWorkers  # imports zmq

        self._remote = RemoteWorkers(self._class_names, None if self.placement is None else self.placement.keys)
        if self._has_started:
            self._remote.start((), self._admit, self._on_end)

    def _as_leased(self, device: Device) -> Device:
        limits = self.leases[device.name].limits
        # "cpu" is also what a device has that says nothing of it.
        if device.accelerator not in ("cpu", limits.accelerator):
            raise ArgumentError(
                f"accelerator={device.accelerator!r} of device {device.name!r}: its daemon at {device.address} runs workers on "
                f"{limits.accelerator!r}: leave it out, or start that with --accelerator {device.accelerator}"
            )
        return dataclasses.replace(
            device, threads=limits.threads, memory=limits.memory_bytes, accelerator=limits.accelerator
        )

    @property
    def socket_folder(self) -> str | None:
        """Where the sockets of the cluster's processes on this host are to lie; ``None`` if it starts none here."""
        return None if self.launcher is None else self.launcher.socket_folder

    def relay(self, source: str, target: str) -> str | None:
        """Return the device through which one party reaches another one; ``None``: directly."""
        link = self._links.get((source, target))
        return None if link is None else link.relay

    def open_relay(self, hub: str, address: str) -> concurrent.futures.Future[str]:
        """Make a device's daemon forward bytes to an address; the future gets the address at which that is reached."""
        relayed: concurrent.futures.Future[str] = concurrent.futures.Future()
        if self._remote is None or hub not in self.hosts:
            relayed.set_exception(
                ArgumentError(f"relay={hub!r} of a link is a device of this host: name one with an address")
            )
            return relayed
        host = self.hosts[hub].host

        def opened(port: concurrent.futures.Future[int]) -> None:
            error = port.exception()
            if error is None:
                relayed.set_result(str(Address(host, port.result())))
            else:
                relayed.set_exception(error)

        self._remote.open_relay(hub, parse_address(address, "address of a party")).add_done_callback(opened)
        return relayed

    def shares_host(self, name: str) -> bool:
        """Whether a device's worker can share memory with this process."""
        return name not in self.hosts or self.hosts[name].host_id == host_id()

    def endpoint_of(self, device: Device) -> TcpEndpoint | None:
        """Return what a device says of where its worker listens, for its daemon to complete; ``None`` for a local one."""
        if device.address is None:
            return None
        has_ports = device.advertise is not None and parse_advertised(device.advertise, "advertise").ports is not None
        return TcpEndpoint(advertise=device.advertise if has_ports else None)

    def start(self, boots: Sequence[Boot], authorise: _Report, on_end: _Report) -> None:
        """Start one worker per boot record, for the devices that are prepared.

        On threads of its own, ``authorise`` lets a worker connect, by name and public key, before it is told who it is,
        and ``on_end`` is told the name of a worker that has ended, and how.
        """
        self._authorise, self._on_end = authorise, on_end
        self._boots = {boot.name: boot for boot in boots}
        self._has_started = True
        if self.launcher is not None:
            self.launcher.start([boot.name for boot in boots if boot.name not in self.leases], self._admit, on_end)
        if self._remote is not None:
            self._remote.start([boot.name for boot in boots if boot.name in self.leases], self._admit, on_end)

    def add(self, boot: Boot) -> None:
        """Start one more worker, for a device that is prepared."""
        self._boots[boot.name] = boot  # first: the key of a leased worker may be here already
        starter = self._starter(boot.name)
        assert starter is not None
        starter.add(boot.name)

    def _admit(self, name: str, public_key: str) -> None:
        # In this order: a worker connects as soon as it has its Boot, and a refusal is final.
        self._authorise(name, public_key)
        starter = self._starter(name)
        boot = self._boots.pop(name, None)
        if starter is not None and boot is not None:
            starter.boot(boot)

    def _starter(self, name: str) -> Launcher | RemoteWorkers | None:
        return self._remote if name in self.leases else self.launcher

    def remove(self, name: str) -> None:
        """End a worker and forget it, without reporting its end; also one that was only asked for."""
        for starter in (self._remote, self.launcher):
            if starter is not None:
                starter.remove(name)
        self._boots.pop(name, None)
        self.leases.pop(name, None)
        self.hosts.pop(name, None)

    def pids(self) -> dict[str, int]:
        """Process ids of the workers on this host that have started and not ended, by device name."""
        return {} if self.launcher is None else self.launcher.pids()

    def stop(self) -> None:
        """End every worker; returns once they have ended."""
        for starter in (self._remote, self.launcher):
            if starter is not None:
                starter.stop()
        if self.placement is not None:
            self.placement.close()

"""A cluster: the workers that one caller owns, with their keys.

Knows devices and processes; models are placed on it by `lingualinked.cluster.pipeline`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Mapping, MutableSet, Sequence
from typing import TYPE_CHECKING, Any, Self

from lingualinked.cluster.closing import close_all, shut_down
from lingualinked.cluster.ray.on_ray import OnRay
from lingualinked.cluster.workers.cluster_workers import ClusterWorkers
from lingualinked.cluster.workers.devices import check_added_device, check_relays, check_throttled, describe_cluster
from lingualinked.cluster.workers.emulation import delayed_from, emulated_link, emulation_of
from lingualinked.cluster.workers.emulation_changes import announce_device, change_behaviour
from lingualinked.cluster_file import Devices
from lingualinked.device import CALLER, Device, Links, check_links
from lingualinked.errors import ArgumentError, UnsupportedOperationError, WorkerDiedError
from lingualinked.interrupts import interruptible, uninterrupted
from lingualinked.processes.resources import check_addition, check_start
from lingualinked.protocol.boot import Boot
from lingualinked.quantities import count_text
from lingualinked.telemetry.reports import WorkerSnapshot
from lingualinked.transport.wire.message_limits import DEFAULT_MAX_FRAME_BYTES, check_frame_limit

if TYPE_CHECKING:
    from lingualinked.cluster.messaging.engine import Engine
    from lingualinked.cluster.ray.ray_placement import RayPlacement
    from lingualinked.telemetry.endpoint import MetricsEndpoint
    from lingualinked.telemetry.recorder import Recorder

DEFAULT_TIMEOUT_S = 600.0
"""Seconds that any one answer of a worker may take unless the user says otherwise."""


class Cluster(OnRay):
    """Worker processes on devices, ready to hold models.

    The workers start when the cluster is made, or when `add` takes in one more, and live until `close`, until the cluster
    is no longer referenced, or until this process is gone, however it goes. Models placed on it, one after the other or
    side by side, use the same processes. Workers of a cluster authenticate each other and the caller with keys made for it
    alone.

    Parameters
    ----------
    devices : int, str, PathLike or sequence of Device
        So many local CPU workers; the devices to run workers on; the path of a cluster file (TOML), which says this and the
        three arguments below; ``"tcp://HOST:PORT#PUBLIC-KEY"`` of a daemon, or several with blanks between them; or
        ``"auto"``: every accelerator of this machine, else two CPU workers.
    links : mapping of (str, str) to Link, optional
        Links between devices, by the names of source and target (``"caller"`` is this process), where they are other than
        what their two ends give: the smaller bandwidth and the sum of the latencies.
    advertise : str or None
        Where devices with an address reach this process, as in `Device`; ``None``: where it connects to them from.
    timeout_s : float or None
        Seconds that any one answer of a worker may take; ``None``: what a cluster file says, else 600.
    max_frame_bytes : int
        Largest frame on a socket, in bytes, 256 KiB at least; larger tensors travel in several, all else in one.
    shared_memory : bool
        Whether tensors of a message that has 16 KiB of them or more travel through memory that two processes share, which is
        faster and not encrypted; it is open only to processes of this user. They travel over sockets, encrypted, if false,
        and where processes can't share memory.

    Raises
    ------
    ArgumentError
        If there is no device, a name occurs twice, a link leads to no device, or a number is not positive.
    ResourceError
        If this process may not open enough files or start enough threads and processes, or has no folder for sockets.
    DaemonError
        If the daemon of a device with an address can't be reached, does not hold the key that it must, or refuses.

    Examples
    --------
    >>> with Cluster(2) as cluster:  # doctest: +SKIP
    ...     first = ShardedModel.from_pretrained(path, cluster=cluster)
    ...     second = ShardedModel.from_pretrained(other, cluster=cluster)
    """

    @interruptible
    def __init__(
        self,
        devices: Devices,
        *,
        links: Links | None = None,
        advertise: str | None = None,
        timeout_s: float | None = None,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        shared_memory: bool = True,
        _class_names: tuple[str, ...] = (),
        _forks: bool | None = None,
        _placement: RayPlacement | None = None,
    ) -> None:
        described = describe_cluster(devices, links=links, advertise=advertise, timeout_s=timeout_s)
        self.devices, self.links, self.advertise = described.devices, described.links, described.advertise
        self.timeout_s = DEFAULT_TIMEOUT_S if described.timeout_s is None else described.timeout_s
        self._behaving = {device.name: device for device in self.devices}  # as the workers do now
        self._changes = threading.Lock()  # one change at a time of what devices there are and how they behave
        if not isinstance(shared_memory, bool):
            raise ArgumentError(f"shared_memory={shared_memory!r} must be True or False")
        self._max_frame_bytes = check_frame_limit(max_frame_bytes)
        self._shared_memory = shared_memory
        check_start(self.devices)
        ends = contextlib.ExitStack()
        self._endpoints: weakref.WeakSet[MetricsEndpoint] = weakref.WeakSet()
        self._recorders: MutableSet[Recorder] = weakref.WeakSet()  # of its models
        ends.callback(close_all, self._endpoints)
        self._finalizer = weakref.finalize(self, shut_down, ends, os.getpid())
        try:
            self._workers = workers = ClusterWorkers(_class_names, forks=_forks, placement=_placement)
            ends.callback(workers.stop)
            self.devices = workers.prepare(self.devices, self.links)
            self._behaving = {device.name: device for device in self.devices}
            # Imported only now: the workers import torch and zmq meanwhile.
            import lingualinked.cluster.messaging.engine  # noqa: F401 - before what an interrupt has to wait for

            self._engine = engine = uninterrupted(_start_engine)(
                ends,
                [device.name for device in self.devices],
                workers.socket_folder,
                max_frame_bytes,
                shared_memory,
                self.advertise,
            )
            engine.use_relays(workers.relay, workers.open_relay)
            engine.trusted = frozenset(device.name for device in self.devices if device.trusted)
            engine.fetching = frozenset(device.name for device in self.devices if device.address is not None)
            engine.expect_delays(delayed_from(CALLER, self._behaving, self.links))
            for device in self.devices:
                engine.shape_link(device.name, emulated_link(None, device, self.links))
            boots = [self._boot(device, self._behaving, self.links) for device in self.devices]
            uninterrupted(workers.start)(boots, engine.authorise_worker, engine.mark_dead)
        except BaseException:
            self._finalizer()
            raise

    def _boot(self, device: Device, behaving: Mapping[str, Device], links: Links) -> Boot:
        address, key = self._engine.address_for(device.name, self._workers.hosts)
        return Boot(
            name=device.name,
            socket_folder=self._workers.socket_folder or "",
            caller_address=address,
            caller_key=key,
            starter_pid=os.getpid(),
            same_host=self._workers.shares_host(device.name),
            tcp=self._workers.endpoint_of(device),
            accelerator=device.accelerator,
            threads=device.threads or 1,
            cpus=device.cpus,
            memory_bytes=device.memory_bytes,
            max_frame_bytes=self._max_frame_bytes,
            shared_memory=self._shared_memory,
            log_level=logging.getLogger("lingualinked").getEffectiveLevel(),
            emulation=emulation_of(device.name, behaving, links),
        )

    @uninterrupted
    def close(self) -> None:
        """End the workers; returns once they are gone. Models on this cluster raise `ClosedError` from then on."""
        self._finalizer()
        self._workers.stop()  # returns at once, or when the thread that is closing the cluster already has done it

    @property
    def closed(self) -> bool:
        """Whether the cluster has been closed."""
        return not self._finalizer.alive

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers, each on its own host, by device name; waits until all have started.

        One that has ended has none.
        """
        for device in self.devices:
            with contextlib.suppress(WorkerDiedError):
                self._engine.wait_for_worker(device.name, self.timeout_s)
        pids = self._engine.pids(self._workers.leases) | self._workers.pids()
        return {device.name: pids[device.name] for device in self.devices if device.name in pids}

    @interruptible
    def wait(self) -> None:
        """Wait until every worker is ready.

        Raises
        ------
        WorkerDiedError
            If a worker ended instead; the message has its last words.
        UnreachableError
            If two devices, or one and this process, can't connect to each other.
        StepTimeoutError
            If a worker was not ready within ``timeout_s``.
        ClosedError
            If the cluster has been closed.
        """
        for device in self.devices:
            self._engine.wait_for_worker(device.name, self.timeout_s)

    def device(self, name: str) -> Device:
        """Return the device of that name.

        Raises
        ------
        ArgumentError
            If there is none.
        """
        for device in self.devices:
            if device.name == name:
                return device
        raise ArgumentError(f"no device {name!r} in this cluster: it has {[device.name for device in self.devices]}")

    @interruptible
    def add(self, device: Device, *, links: Links | None = None) -> None:
        """Add a device while models run on the others; return once its worker is ready.

        From then on it is the last of `devices`, and is treated as if it had been there from the start. Models that run
        stay where they are; those that are loaded or rebalanced later may use it.

        Parameters
        ----------
        device : Device
            Where to start a worker.
        links : mapping of (str, str) to Link, optional
            Links from and to it, as in `Cluster`, where they are other than what their two ends give.

        Raises
        ------
        ArgumentError
            If it is no device, its name is taken, a core is not this process's to use, or a link is not one of its own.
        ResourceError
            If this process may not open enough files or start enough threads and processes.
        DaemonError
            As in `Cluster`.
        UnreachableError
            If it and another device or this process can't connect to each other.
        ClosedError
            If the cluster has been closed, also meanwhile.
        WorkerDiedError
            If its worker ended instead of being ready; the message has its last words.
        StepTimeoutError
            If its worker was not ready within ``timeout_s``, or another one did not answer.

        Notes
        -----
        After an error the cluster is as it was before. A worker that has died does not stand in the way.

        Examples
        --------
        >>> cluster.add(Device(name="late", threads=1))  # doctest: +SKIP
        """
        self._engine.check_owner()  # before the lock, which a fork may have left taken
        with self._changes:
            before = self.devices, self.links, self._behaving
            device = check_added_device(device, self.devices, self._engine.ended_devices())
            check_addition(device)
            behaving = {**self._behaving, device.name: device}
            known = {**self.links, **check_links(links or {}, behaving, device.name)}
            check_relays(known, [*self.devices, device])
            try:
                (device,) = self._workers.prepare([device], known)
                behaving[device.name] = device
                self._engine.expect_worker(device.name)
                self._engine.shape_link(device.name, emulated_link(None, device, known))
                self._engine.expect_delays(delayed_from(CALLER, behaving, known))
                others = [other.name for other in self.devices]
                announce_device(self._engine, others, behaving, known, self.timeout_s)
                self._workers.add(self._boot(device, behaving, known))
                self._engine.wait_for_worker(device.name, self.timeout_s)
                self._engine.trusted |= {device.name} if device.trusted else set()
                self._engine.fetching |= {device.name} if device.address is not None else set()
                self._behaving, self.links, self.devices = behaving, known, (*self.devices, device)
            except BaseException:
                self.devices, self.links, self._behaving = before
                uninterrupted(self._workers.remove)(device.name)
                uninterrupted(self._engine.drop_worker)(device.name)
                raise

    @property
    def is_throttled(self) -> bool:
        """Whether a worker behaves as another device than it was made as (`throttle`)."""
        return self._behaving != {device.name: device for device in self.devices}

    def as_it_behaves(self, device: Device) -> Device:
        """Return a device as its worker behaves now (`throttle`)."""
        return self._behaving[device.name]

    def throttle(
        self,
        name: str,
        *,
        slowdown: float | None = None,
        bandwidth: float | str | None = None,
        latency: float | str | None = None,
    ) -> None:
        """Make a worker emulate a slower or faster device from now on; what is not given stays as it is.

        `devices` says what each was made as: what has changed is for telemetry to find out, as it is with a real device.

        Parameters
        ----------
        name : str
            Of the device.
        slowdown, bandwidth, latency
            As in `Device`.

        Raises
        ------
        ArgumentError
            If there is no such device, or a value can't be used; also for ``bandwidth`` and ``latency`` of a device with an
            `address`, whose connections are not emulated.
        ClosedError, WorkerDiedError, StepTimeoutError
            If a worker can't be told.
        """
        check_throttled(self.device(name), bandwidth, latency)
        self._engine.check_owner()
        with self._changes:
            before = self._behaving
            changed = dataclasses.replace(
                before[name],
                slowdown=before[name].slowdown if slowdown is None else slowdown,
                bandwidth=before[name].bandwidth if bandwidth is None else bandwidth,
                latency=before[name].latency if latency is None else latency,
            )
            self._behaving = behaving = {**before, name: changed}
            self.wait()
            change_behaviour(self._engine, name, before, behaving, self.links, self.timeout_s)

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Ask every worker how it is."""
        from lingualinked.cluster.workers.inspection import inspect_workers  # imports torch

        self.wait()
        names = [device.name for device in self.devices]
        return tuple(each.worker for each in inspect_workers(self._engine, names, self.timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(
            "a cluster can't be pickled or copied: its workers belong to this process; pass its devices, and make one there"
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else count_text(len(self.devices), "worker")
        return f"<Cluster of {', '.join(device.name for device in self.devices)}: {state}>"


def _start_engine(
    ends: contextlib.ExitStack,
    devices: Sequence[str],
    socket_folder: str | None,
    max_frame_bytes: int,
    shared_memory: bool,
    advertise: str | None,
) -> Engine:
    from lingualinked.cluster.messaging.engine import Engine  # imports torch and zmq

    engine = Engine(devices, socket_folder, max_frame_bytes, shared_memory, advertise)
    ends.callback(engine.stop)
    return engine

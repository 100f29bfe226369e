"""A cluster: the workers that one caller owns, with their keys.

Knows devices and processes; models are placed on it by `lingualinked.cluster.pipeline`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lingualinked.cluster.launch import Launcher
from lingualinked.device import CALLER, Device, Links, check_links, link_between
from lingualinked.errors import ArgumentError, WorkerDiedError
from lingualinked.protocol.boot import Boot, Imitation, LinkFigures
from lingualinked.telemetry.snapshot import WorkerSnapshot

if TYPE_CHECKING:
    from lingualinked.protocol.messages import Imitate

DEFAULT_TIMEOUT_S = 600.0
"""Seconds that any one answer of a worker may take unless the user says otherwise."""

DEFAULT_MAX_FRAME_BYTES = 1024**2
"""Largest frame on a socket; larger tensors travel in several."""


class Cluster:
    """Worker processes on devices, ready to hold models.

    The workers start when the cluster is made and live until `close`, until the cluster is no longer referenced, or
    until this process is gone, however it goes. Models placed on it, one after the other or side by side, use the
    same processes. Workers of a cluster authenticate each other and the caller with keys made for it alone.

    Parameters
    ----------
    devices : int or sequence of Device
        So many local CPU workers, or the devices to run workers on.
    links : mapping of (str, str) to Link, optional
        Links between devices, by the names of source and target (``"caller"`` is this process), where they are other than
        what their two ends give: the smaller bandwidth and the sum of the latencies.
    timeout_s : float or None
        Seconds that any one answer of a worker may take; ``None``: 600.
    max_frame_bytes : int
        Largest frame on a socket, in bytes; larger tensors travel in several.

    Raises
    ------
    ArgumentError
        If there is no device, a name occurs twice, a link leads to no device, or a number is not positive.

    Examples
    --------
    >>> with Cluster(2) as cluster:  # doctest: +SKIP
    ...     first = ShardedModel.from_pretrained(path, cluster=cluster)
    ...     second = ShardedModel.from_pretrained(other, cluster=cluster)
    """

    def __init__(
        self,
        devices: int | Sequence[Device],
        *,
        links: Links | None = None,
        timeout_s: float | None = None,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        _class_names: tuple[str, ...] = (),
        _forks: bool | None = None,
    ) -> None:
        self.devices = as_devices(devices)
        self.links = check_links(links or {}, [device.name for device in self.devices])
        self._behaving = {device.name: device for device in self.devices}  # as the workers do now
        self.timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else _positive(timeout_s, "timeout_s")
        if not isinstance(max_frame_bytes, int):
            raise ArgumentError(f"max_frame_bytes={max_frame_bytes!r} must be a whole number")
        _positive(max_frame_bytes, "max_frame_bytes")
        ends = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, _shut_down, ends, os.getpid())
        try:
            self._launcher = launcher = Launcher(_class_names, forks=_forks)
            ends.callback(launcher.stop)
            # Imported only now: the workers import torch and zmq meanwhile.
            from lingualinked.cluster.engine import Engine
            from lingualinked.transport.keys import generate_keypair

            keys = {name: generate_keypair() for name in (CALLER, *(device.name for device in self.devices))}
            public_keys = {device.name: keys[device.name].public for device in self.devices}
            self._engine = engine = Engine(keys[CALLER], public_keys, max_frame_bytes)
            ends.callback(engine.stop)
            for device in self.devices:
                engine.shape(device.name, link_between(None, device, self.links))
            launcher.start(
                [
                    Boot(
                        name=device.name,
                        public_key=keys[device.name].public,
                        secret_key=keys[device.name].secret,
                        authorised={keypair.public: name for name, keypair in keys.items()},
                        caller_address=engine.address,
                        caller_key=keys[CALLER].public,
                        caller_pid=os.getpid(),
                        accelerator=device.accelerator,
                        threads=device.threads or 1,
                        cpus=device.cpus,
                        memory_bytes=device.memory_bytes,
                        max_frame_bytes=max_frame_bytes,
                        log_level=logging.getLogger("lingualinked").getEffectiveLevel(),
                        imitation=self._imitation(device),
                    )
                    for device in self.devices
                ],
                engine.worker_ended,
            )
        except BaseException:
            self._finalizer()
            raise

    def close(self) -> None:
        """End the workers; returns once they are gone. Models on this cluster raise `ClosedError` from then on."""
        self._finalizer()
        self._launcher.stop()  # returns at once, or when the thread that is closing the cluster already has done it

    @property
    def closed(self) -> bool:
        """Whether the cluster has been closed."""
        return not self._finalizer.alive

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers, by device name; waits until all have started. One that has ended has none."""
        for device in self.devices:
            with contextlib.suppress(WorkerDiedError):
                self._engine.wait_for_worker(device.name, self.timeout_s)
        return self._launcher.pids()

    def wait(self) -> None:
        """Wait until every worker is ready.

        Raises
        ------
        WorkerDiedError
            If a worker ended instead; the message has its last words.
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

    def throttle(
        self,
        name: str,
        *,
        slowdown: float | None = None,
        bandwidth: float | str | None = None,
        latency: float | str | None = None,
    ) -> None:
        """Have a worker behave as a slower or faster device from now on; what is not given stays as it is.

        `devices` stays as it was made: what has changed is for telemetry to find out, as it is with a real device.

        Parameters
        ----------
        name : str
            Of the device.
        slowdown, bandwidth, latency
            As in `Device`.

        Raises
        ------
        ArgumentError
            If there is no such device, or a value can't be used.
        ClosedError, WorkerDiedError, StepTimeoutError
            If a worker can't be told.
        """
        from lingualinked.cluster.pending import results_of

        self.device(name)
        before = self._behaving[name]
        self._behaving[name] = changed = dataclasses.replace(
            before,
            slowdown=before.slowdown if slowdown is None else slowdown,
            bandwidth=before.bandwidth if bandwidth is None else bandwidth,
            latency=before.latency if latency is None else latency,
        )
        self.wait()
        self._engine.shape(name, link_between(None, changed, self.links))
        told = [
            self._engine.request(device.name, self._imitate(device), "a change of pace", self.timeout_s)
            for device in self._behaving.values()
        ]
        results_of(told)

    def _imitate(self, device: Device) -> Callable[[int], Imitate]:
        from lingualinked.protocol.messages import Imitate

        imitation = self._imitation(device)
        return lambda number: Imitate(request=number, imitation=imitation)

    def _imitation(self, device: Device) -> Imitation:
        links = []
        for other in (None, *self._behaving.values()):
            if other is None or other.name != device.name:
                link = link_between(device, other, self.links)
                bandwidth = link.bandwidth_bytes_per_s
                links.append(
                    LinkFigures(
                        target=CALLER if other is None else other.name,
                        bandwidth_bytes_per_s=None if bandwidth == math.inf else bandwidth,
                        latency_s=link.latency_s,
                    )
                )
        return Imitation(slowdown=device.slowdown, links=tuple(links))

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Ask every worker how it is."""
        from lingualinked.cluster.inspection import inspect_workers

        self.wait()
        names = [device.name for device in self.devices]
        return tuple(each.worker for each in inspect_workers(self._engine, names, self.timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.devices)} workers"
        return f"<Cluster of {', '.join(device.name for device in self.devices)}: {state}>"


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shut_down(ends: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child: the workers are the parent's
    if threading.current_thread().name.startswith("lingualinked-"):
        # The last reference went on a thread of ours, which can't wait for its own end.
        threading.Thread(target=ends.close, name="closing-lingualinked").start()
    else:
        ends.close()


def as_devices(devices: int | Sequence[Device]) -> tuple[Device, ...]:
    """Return the devices that a cluster would have: so many local ones, or these, each with its number of threads.

    Raises
    ------
    ArgumentError
        If there is none, a name occurs twice, or a core is not this process's to use.
    """
    if isinstance(devices, bool) or not isinstance(devices, int | Sequence) or isinstance(devices, str):
        raise ArgumentError(f"devices={devices!r} must be a number of local workers or a sequence of Device")
    if isinstance(devices, int):
        if devices < 1:
            raise ArgumentError(f"devices={devices} must be at least 1")
        devices = [Device(name=f"worker-{index}") for index in range(devices)]
    if not devices:
        raise ArgumentError("devices is empty: a cluster needs at least one")
    share = max(1, usable_cores() // len(devices))
    filled: list[Device] = []
    for device in devices:
        if not isinstance(device, Device):
            raise ArgumentError(f"devices holds {device!r}, which is no lingualinked.Device")
        if any(device.name == other.name for other in filled):
            raise ArgumentError(f"two devices are named {device.name!r}: names must differ")
        _check_local(device)
        threads = device.threads or (share if device.cpus is None else len(device.cpus))
        filled.append(dataclasses.replace(device, threads=threads))
    return tuple(filled)


def _check_local(device: Device) -> None:
    if device.cpus is not None:
        if not hasattr(os, "sched_getaffinity"):
            raise ArgumentError(
                f"cpus of device {device.name!r}: this system can't pin a process to cores; leave it out"
            )
        foreign = sorted(set(device.cpus) - os.sched_getaffinity(0))
        if foreign:
            raise ArgumentError(
                f"cpus={device.cpus} of device {device.name!r}: cores {foreign} are not among those this process "
                f"may use ({sorted(os.sched_getaffinity(0))})"
            )


def _positive(value: float, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"{field}={value!r} must be a positive, finite number")
    return value

"""Examines a cluster: which parties reach each other, what each computes with, and how fast devices and links are.

Knows how to start clusters and to measure on them; neither users' models nor how findings are shown. A failure is a finding
like others, and hides none of them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.measuring.link_probing import Pair, all_pairs, measure_pair, rounds
from lingualinked.cluster.measuring.profiling import share_of_memory
from lingualinked.cluster.workers.inspection import inspect_workers
from lingualinked.cluster.workers.remote_hosts import free_disk_bytes
from lingualinked.cluster_file import ClusterDescription
from lingualinked.device import CALLER, Device
from lingualinked.device_specs import DeviceSpecs
from lingualinked.environment import Environment, describe_difference
from lingualinked.errors import LingualinkedError
from lingualinked.link_profile import LinkProfile
from lingualinked.model.process.environment_probe import read_environment
from lingualinked.sharded.profiles.device_rates import measure_rates


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFinding:
    """What was found on a device; what is ``None`` could not be found, and ``trouble`` says why."""

    device: Device
    environment: Environment | None = None
    memory_bytes: int | None = None  # free, and not claimed by other devices of its machine
    disk_bytes: int | None = None  # free, where it keeps weights
    specs: DeviceSpecs | None = None
    trouble: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinkFinding:
    """What was found of the link from one party to another."""

    source: str
    target: str
    link: LinkProfile | None = None
    trouble: str = ""
    is_of_lost_end: bool = False  # whether it was not tried, since one of its devices can't be used at all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All findings on a cluster."""

    caller: Environment
    devices: tuple[DeviceFinding, ...]
    links: tuple[LinkFinding, ...]  # of every ordered pair

    @property
    def is_well(self) -> bool:
        """Whether nothing failed."""
        return not any(each.trouble for each in self.devices) and not any(each.trouble for each in self.links)

    @property
    def inexact_because(self) -> str:
        """Why a model on all of these devices can't give the bits of the unsharded one; empty if nothing is known against it."""
        known = {each.device.name: each.environment for each in self.devices if each.environment is not None}
        return describe_difference({CALLER: self.caller, **known})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StartedDevices:
    """What a checkup asked for, and those of its devices that could be started."""

    asked: ClusterDescription
    cluster: Cluster | None  # of all that can be used, if they can be used together
    troubles: Mapping[str, str]  # why the others can't, by name


@contextlib.contextmanager
def start_usable(asked: ClusterDescription) -> Iterator[StartedDevices]:
    """Start a cluster of those devices that can be used."""
    devices = asked.devices
    with contextlib.ExitStack() as ends:
        # 1) all together
        cluster, trouble = _try_to_start(ends, asked, devices)
        troubles: dict[str, str] = {}
        # 2) if that fails: those that can be used alone
        if trouble:
            with concurrent.futures.ThreadPoolExecutor(len(devices)) as threads:
                alone = threads.map(lambda device: _trouble_alone(asked, device), devices)
                troubles = {device.name: each for device, each in zip(devices, alone, strict=True) if each}
            usable = [device for device in devices if device.name not in troubles]
            if troubles and usable:
                cluster, _ = _try_to_start(ends, asked, usable)
        yield StartedDevices(asked=asked, cluster=cluster, troubles=troubles)


def examine(started: StartedDevices, dtype: str) -> Checkup:
    """Measure every device, with layers in a dtype, and every link, as far as they can be used."""
    devices, troubles = started.asked.devices, started.troubles
    usable = [device for device in devices if device.name not in troubles]
    pairs = all_pairs([CALLER, *(device.name for device in usable)])
    # 1) measure what can be used
    if started.cluster is not None:
        found = {each.device.name: each for each in _examine_devices(started.cluster, dtype)}
        links = _examine_links(started.cluster, pairs)
    else:
        found, links = _examine_apart(started.asked, usable, pairs, dtype)
    # 2) add what can't
    for device in devices:
        if device.name in troubles:
            found[device.name] = DeviceFinding(device=device, trouble=troubles[device.name])
    names = [CALLER, *(device.name for device in devices)]
    known = {(each.source, each.target): each for each in links}
    return Checkup(
        caller=read_environment(),
        devices=tuple(found[device.name] for device in devices),
        links=tuple(known.get(ends) or _link_of_lost_end(ends, troubles) for ends in itertools.permutations(names, 2)),
    )


def _link_of_lost_end(ends: Pair, troubles: Mapping[str, str]) -> LinkFinding:
    lost = " and ".join(repr(name) for name in ends if name in troubles)
    return LinkFinding(source=ends[0], target=ends[1], trouble=f"{lost} can't be used", is_of_lost_end=True)


def _try_to_start(
    ends: contextlib.ExitStack, asked: ClusterDescription, devices: Sequence[Device]
) -> tuple[Cluster | None, str]:
    """Start a cluster of some devices, which ends with `ends`; return it, or why it can't be."""
    names = {CALLER, *(device.name for device in devices)}
    links = {
        pair: link
        for pair, link in asked.links.items()
        if names.issuperset(pair) and (link.relay is None or link.relay in names)
    }
    described = dataclasses.replace(asked, devices=tuple(devices), links=links)
    with contextlib.ExitStack() as started:
        try:
            cluster = started.enter_context(Cluster(described))
            cluster.wait()
        except LingualinkedError as error:
            return None, _said(error)
        ends.push(started.pop_all())
        return cluster, ""


def _trouble_alone(asked: ClusterDescription, device: Device) -> str:
    with contextlib.ExitStack() as ends:
        _, trouble = _try_to_start(ends, asked, [device])
        return trouble


def _examine_devices(cluster: Cluster, dtype: str) -> list[DeviceFinding]:
    """Ask every device of a cluster, and measure all at the same time, as they would compute."""
    with concurrent.futures.ThreadPoolExecutor(len(cluster.devices)) as threads:
        return list(threads.map(lambda device: _examine_device(cluster, device, dtype), cluster.devices))


def _examine_device(cluster: Cluster, device: Device, dtype: str) -> DeviceFinding:
    engine = cluster._engine  # noqa: SLF001 - what a worker says when it is ready
    environments = engine.environments()
    own = environments[device.name]
    finding = DeviceFinding(device=device, environment=own, disk_bytes=free_disk_bytes(cluster, device))
    beside = [each for each in cluster.devices if environments[each.name].machine == own.machine]
    try:
        (report,) = inspect_workers(engine, [device.name], cluster.timeout_s)
        available = report.device.available_bytes
        finding = dataclasses.replace(
            finding,
            memory_bytes=available if device.memory is not None else share_of_memory(device, beside, available),
            specs=measure_rates(cluster, device, dtype),
        )
    except LingualinkedError as error:
        return dataclasses.replace(finding, trouble=_said(error))
    return finding


def _examine_links(cluster: Cluster, pairs: Sequence[Pair]) -> list[LinkFinding]:
    """Measure the links between pairs, each while no other pair uses the same two hosts."""
    hosts = {name: each.host_id for name, each in cluster._engine.environments().items()}  # noqa: SLF001 - as above
    found: list[LinkFinding] = []
    for disjoint in rounds(pairs, hosts):
        with concurrent.futures.ThreadPoolExecutor(len(disjoint)) as threads:
            for findings in threads.map(lambda pair: _examine_pair(cluster, pair), disjoint):
                found += findings
    return found


def _examine_pair(cluster: Cluster, pair: Pair) -> list[LinkFinding]:
    try:
        links = measure_pair(cluster, *pair)
    except LingualinkedError as error:
        return _both_ways(pair, _said(error))
    return [LinkFinding(source=each.source, target=each.target, link=each) for each in links]


def _examine_apart(
    asked: ClusterDescription, devices: Sequence[Device], pairs: Sequence[Pair], dtype: str
) -> tuple[dict[str, DeviceFinding], list[LinkFinding]]:
    """Examine devices that can't be used together, one by one and two by two."""
    found: dict[str, DeviceFinding] = {}
    between: list[LinkFinding] = []
    for pair in pairs:
        relays = {asked.links[ends].relay for ends in (pair, pair[::-1]) if ends in asked.links}
        two = [device for device in devices if device.name in (*pair, *relays)]
        with contextlib.ExitStack() as ends:
            cluster, trouble = _try_to_start(ends, asked, two)
            if cluster is None:
                between += _both_ways(pair, trouble)
                continue
            if CALLER in pair:
                found |= {each.device.name: each for each in _examine_devices(cluster, dtype)}
            between += _examine_pair(cluster, pair)
    return {device.name: found.get(device.name, DeviceFinding(device=device)) for device in devices}, between


def _both_ways(pair: Pair, trouble: str) -> list[LinkFinding]:
    return [LinkFinding(source=source, target=target, trouble=trouble) for source, target in (pair, pair[::-1])]


def _said(error: LingualinkedError) -> str:
    return str(error).partition("\n\nRemote traceback")[0]

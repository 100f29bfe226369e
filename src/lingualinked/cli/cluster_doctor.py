"""``lingualinked doctor --cluster``: examines the devices of a cluster and the links between them, and plans a model on them.

Knows the findings of a checkup, plans, and cluster files; prints, and writes a file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from lingualinked.cli.devices_option import read_devices
from lingualinked.cli.plan_command import load_format_of
from lingualinked.cluster_file import ClusterDescription
from lingualinked.cluster_file_writer import write_cluster_file
from lingualinked.console import new_console
from lingualinked.device import CALLER, Device, Link
from lingualinked.device_specs import DeviceSpecs
from lingualinked.display.plan_view import plan_rows
from lingualinked.errors import ArgumentError, InfeasiblePlanError, LingualinkedError
from lingualinked.planning.estimate import HOP_LATENCY_S
from lingualinked.planning.one_more import weigh_one_more
from lingualinked.public_key import fingerprint
from lingualinked.quantities import bytes_text, seconds_text
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.tables import Rows
from lingualinked.transport.keys.key_lists import find_server_key

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.planning.plan import Plan
    from lingualinked.profile import Profile
    from lingualinked.sharded.loading.describing import Described
    from lingualinked.sharded.profiles.cluster_checkup import Checkup, DeviceFinding
    from lingualinked.workload import Objective, Workload

_DTYPE = "bfloat16"  # of rates, without a model


def run_cluster_doctor(
    devices: str,
    *,
    toml: Path | None,
    model: str | None,
    dtype: str,
    workload: Workload,
    knows_sessions: bool,
    objective: Objective,
    progress: bool,
) -> bool:
    """Print what is found, write it to a cluster file if one is given, and return whether all is well."""
    from lingualinked.planning.planner import solve  # imports scipy
    from lingualinked.sharded.loading.describing import describe  # imports torch
    from lingualinked.sharded.profiles.cluster_checkup import examine, start_usable

    # 1) read what is asked
    asked = read_devices(devices)
    if toml is not None and toml.exists():
        raise ArgumentError(f"there is a file {str(toml)!r} already, which is not overwritten: choose another name")
    described = (
        None if model is None else describe(LoadArguments.of(model, dtype=dtype, load_format=load_format_of(model)))
    )
    rates_dtype = described.spec.dtype if described is not None else _DTYPE if dtype == "auto" else dtype
    console = new_console()
    if progress:
        typer.echo(f"Examining {', '.join(device.name for device in asked.devices)} ...", err=True)
    with start_usable(asked) as started:
        # 2) examine devices and links
        checkup = examine(started, rates_dtype)
        for rows in (_device_rows(checkup, rates_dtype), _version_rows(checkup), _link_rows(checkup)):
            console.print(rows)
        if toml is not None:
            _write_toml(toml, asked, checkup, rates_dtype)
        # 3) plan the model
        solved = functools.partial(
            solve, objective=objective, workload=workload, num_sessions=None if knows_sessions else "any"
        )
        fits = described is None or _plan_model(console, described, started.cluster, workload, solved, progress)
    return checkup.is_well and fits


def _device_rows(checkup: Checkup, dtype: str) -> Rows:
    rows = [
        (
            each.device.name,
            "this machine" if each.device.address is None else each.device.address,
            _key_of(each.device),
            *_processor_cells(each),
            *("-" if number is None else bytes_text(number) for number in (each.memory_bytes, each.disk_bytes)),
            *(("-", "-") if each.specs is None else _rate_cells(each.specs)),
        )
        for each in checkup.devices
    ]
    columns = ("device", "at", "key", "computes on", "threads", "free memory", "free disk", "GFLOP/s", "GB/s")
    notes = [f"{each.device.name}: {each.trouble}" for each in checkup.devices if each.trouble]
    return Rows(f"Devices, with rates of layers in {dtype}", columns, rows, notes=notes)


def _key_of(device: Device) -> str:
    """Return the fingerprint of the key by which a device's daemon is known."""
    if device.address is None:
        return "-"
    try:
        return fingerprint(find_server_key(device))
    except LingualinkedError:
        return "not known"


def _processor_cells(finding: DeviceFinding) -> tuple[str, str]:
    environment = finding.environment
    if environment is None:
        return "can't be used", "-"
    return environment.accelerator or environment.processor, str(environment.threads)


def _rate_cells(specs: DeviceSpecs) -> tuple[str, str]:
    return f"{specs.flops_per_s / 1e9:,.1f}", f"{specs.memory_bytes_per_s / 1e9:,.1f}"


def _version_rows(checkup: Checkup) -> Rows:
    known = [(CALLER, checkup.caller)]
    known += [(each.device.name, each.environment) for each in checkup.devices if each.environment is not None]
    rows = [
        (name, each.host, *each.versions, each.cpu_capability if not each.accelerator else "-") for name, each in known
    ]
    because = checkup.inexact_because
    exact = f"not exact: {because}" if because else "exact; workers compare how they round when they load one"
    note = f"A model on all of them is {exact}."
    columns = ("party", "host", "lingualinked", "torch", "transformers", "Python", "instruction set")
    return Rows("Versions", columns, rows, notes=[note])


def _link_rows(checkup: Checkup) -> Rows:
    rows = []
    for each in checkup.links:
        link = each.link
        bandwidth = None if link is None else link.bandwidth_bytes_per_s
        rows.append(
            (
                f"{each.source} -> {each.target}",
                "no" if link is None else "yes",
                "-" if link is None else seconds_text(link.latency_s),
                "-" if bandwidth is None else f"{8 * bandwidth / 1e6:,.0f} Mbit/s",
            )
        )
    failed = [each for each in checkup.links if each.link is None and not each.is_of_lost_end]
    reasons = {each.trouble: f"{each.source} -> {each.target}: {each.trouble}" for each in reversed(failed)}
    return Rows(
        "Links", ("from -> to", "reached", "latency", "bandwidth"), rows, notes=list(reversed(reasons.values()))
    )


def _write_toml(path: Path, asked: ClusterDescription, checkup: Checkup, dtype: str) -> None:
    """Write a cluster file with the measured figures, of the devices that can be used."""
    usable = [each for each in checkup.devices if each.specs is not None]
    if not usable:
        raise ArgumentError(f"no device could be measured, and nothing was written to {str(path)!r}")
    stated = {device.name: device for device in asked.devices}
    devices, specs, comments = [], {}, {}
    for each in usable:
        device, own = stated[each.device.name], each.specs
        assert own is not None
        if device.memory is None and each.memory_bytes is not None:
            device = dataclasses.replace(device, memory=_memory_text(each.memory_bytes))
        threads = None if each.environment is None else each.environment.threads
        devices.append(dataclasses.replace(device, threads=device.threads or threads))
        specs[device.name] = DeviceSpecs(
            flops=f"{own.flops_per_s / 1e9:.1f}GFLOP/s", memory_bandwidth=f"{own.memory_bytes_per_s / 1e9:.2f}GB/s"
        )
        processor, _ = _processor_cells(each)
        comments[device.name] = [f"{processor}; rates are of layers in {dtype}, memory is what was free"]
    left_out = [each.device.name for each in checkup.devices if each.specs is None]
    head = [
        "Measured by lingualinked doctor; lingualinked plan takes it as it is. Links within one host are left out.",
        f"The latency of a link is what was measured less {seconds_text(HOP_LATENCY_S)}, which plan adds for handling a message.",
        *([f"Left out, since they could not be measured: {', '.join(left_out)}"] if left_out else []),
    ]
    names = {CALLER, *specs}
    links = {ends: link for ends, link in asked.links.items() if names.issuperset(ends)} | _far_links(asked, checkup)
    described = ClusterDescription(
        devices=tuple(devices), links=links, specs=specs, advertise=asked.advertise, timeout_s=asked.timeout_s
    )
    write_cluster_file(path, described, comments=comments, head=head)


def _far_links(asked: ClusterDescription, checkup: Checkup) -> dict[tuple[str, str], Link]:
    """Return the measured links between hosts; those within one are emulated, if they are stated."""
    hosts = {each.device.name: each.environment.host_id for each in checkup.devices if each.environment is not None}
    hosts[CALLER] = checkup.caller.host_id
    found = {}
    for each in checkup.links:
        link, ends = each.link, (each.source, each.target)
        if link is None or hosts[each.source] == hosts[each.target]:
            continue
        stated = asked.links.get(ends, Link())
        found[ends] = Link(
            bandwidth=None
            if link.bandwidth_bytes_per_s is None
            else f"{8 * link.bandwidth_bytes_per_s / 1e6:.1f}Mbit/s",
            latency=f"{1e6 * max(0.0, link.latency_s - HOP_LATENCY_S):.0f}us",
            relay=stated.relay,
        )
    return found


def _memory_text(num_bytes: int) -> str:
    return f"{num_bytes // 2**20}MiB"


def _plan_model(
    console: Console,
    described: Described,
    cluster: Cluster | None,
    workload: Workload,
    solved: Callable[[Profile], Plan],
    progress: bool,
) -> bool:
    """Print whether a model fits, its plan, and what one more device would change; return whether it fits."""
    from lingualinked.cluster.workers.remote_hosts import remote_available_bytes  # imports torch
    from lingualinked.sharded.profiles.saved import check_devices, find_profile

    if cluster is None:
        console.print(Text("No plan: the devices can't be used together."))
        return False
    footprint = described.footprint()
    footprint.profile.fit_workload(workload)
    try:
        check_devices(footprint, cluster.devices, cluster.links, workload, remote_available_bytes(cluster))
        profile = find_profile(cluster, footprint, workload, progress=progress)
        plan = solved(profile)
    except InfeasiblePlanError as error:
        console.print(Text(f"{footprint.profile.name} does not fit: {error}", style="red"))
        return False
    console.print(plan_rows(plan))
    for each in weigh_one_more(plan):
        console.print(Text(f"With {each.change}: {each.tokens_per_s:.1f} tokens/s ({each.gain:.2f} times as good)."))
    return True

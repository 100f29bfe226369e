"""``lingualinked discover``: finds daemons of the local network that announce themselves.

Knows announcements and the daemons that the user trusts; prints, and writes a cluster file. Nothing is trusted by being found.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import typer

from lingualinked.cluster_file import ClusterDescription
from lingualinked.cluster_file_writer import write_cluster_file
from lingualinked.device import Device
from lingualinked.public_key import fingerprint
from lingualinked.quantities import count_text
from lingualinked.transport.hosts.announcing import Announcement, find_announced
from lingualinked.transport.keys.key_lists import KnownHost, hosts_path, known_hosts


def run_discover(seconds: float, path: Path | None, interface: str | None) -> None:
    """Print what is found, and write a cluster file of it if a path is given."""
    known = known_hosts()
    found = find_announced(seconds, interface)
    if not found:
        typer.echo(
            f"No daemon announced itself within {seconds:g} s. Start it by `lingualinked worker --announce`; multicast DNS "
            "(UDP port 5353) must not be blocked on the way.",
            err=True,
        )
        raise typer.Exit(1)
    for each in found:  # no table: what is wrapped or cut can't be copied
        typer.echo(f"{each.name}  {each.address}  {each.hardware}")
        typer.echo(f"  {each.fingerprint}  {_standing(each, known.get(each.address))}")
    unknown = [each.address for each in found if each.address not in known]
    if unknown:
        typer.echo(
            "Nothing is trusted by being found. Compare the fingerprint with what `lingualinked keys list` shows on that "
            f"device, and run\n  lingualinked keys trust {shlex.quote(unknown[0])} PUBKEY"
        )
    if path is not None:
        write_cluster_file(
            path,
            ClusterDescription(devices=(devices := devices_of(found, known))),
            comments={device.name: _comments(device, found, known) for device in devices},
            head=[
                "Found by `lingualinked discover`. Nothing is trusted by being found: a server_key is for you to state."
            ],
        )
        typer.echo(f"Wrote {count_text(len(devices), 'device')} to {path}")


def devices_of(found: Sequence[Announcement], known: dict[str, KnownHost]) -> tuple[Device, ...]:
    """Return a device for each address, with a name of its own, and with its key if the user knows that."""
    devices: dict[str, Device] = {}
    for each in found:
        names = {device.name for device in devices.values()}
        name, number = each.name, 1
        while name in names:
            number += 1
            name = f"{each.name}-{number}"
        host = known.get(each.address)
        key = None if host is None else host.public_key
        devices.setdefault(each.address, Device(name=name, address=each.address, server_key=key))
    return tuple(devices.values())


def _comments(device: Device, found: Sequence[Announcement], known: dict[str, KnownHost]) -> list[str]:
    announced = [each for each in found if each.address == device.address]
    return [
        line
        for each in announced
        for line in (each.hardware, f"announces the key {each.fingerprint}: {_standing(each, known.get(each.address))}")
    ]


def _standing(announced: Announcement, known: KnownHost | None) -> str:
    """Say whether the user knows the key of a daemon."""
    if known is None:
        return "not known to you"
    if fingerprint(known.public_key) == announced.fingerprint:
        return f"known, line {known.line} of {hosts_path()}"
    return f"NOT THE KEY that you know: line {known.line} of {hosts_path()} has {fingerprint(known.public_key)}"

"""Reads a cluster file (TOML): devices, links, and the stated rates of devices.

Knows the form of the file; `Device` and `Link` check their own fields.
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from lingualinked.cluster.devices import as_devices
from lingualinked.device import Device, Link, check_links
from lingualinked.errors import ArgumentError
from lingualinked.planning.estimate import DeviceSpecs

_SPECS = tuple(field.name for field in dataclasses.fields(DeviceSpecs))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """The contents of a cluster file."""

    devices: tuple[Device, ...]
    links: dict[tuple[str, str], Link]
    specs: dict[str, DeviceSpecs]  # by name, for the devices that state ``flops`` and ``memory_bandwidth``


def read_devices(asked: str) -> ClusterFile:
    """Read ``--devices``: a number of local CPU workers, or the path of a cluster file."""
    if asked.isdecimal():
        return ClusterFile(devices=as_devices(int(asked)), links={}, specs={})
    return read_cluster_file(Path(asked))


def read_cluster_file(path: Path) -> ClusterFile:
    """Read a cluster file; an error names the value that can't be used."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArgumentError(f"no cluster file at {str(path)!r}: {error}") from error
    _refuse_unknown(content, ("devices", "links"), str(path))
    tables = content.get("devices")
    if not isinstance(tables, list) or not tables:
        raise ArgumentError(f"{path} has no [[devices]]: a cluster needs at least one")
    devices: list[Device] = []
    specs: dict[str, DeviceSpecs] = {}
    known = tuple(field.name for field in dataclasses.fields(Device))
    for table in tables:
        _refuse_unknown(table, (*known, *_SPECS), f"a [[devices]] table of {path}")
        if "name" not in table:
            raise ArgumentError(f"a [[devices]] table of {path} has no name")
        device = Device(**{name: _frozen(value) for name, value in table.items() if name not in _SPECS})
        if any(device.name == other.name for other in devices):
            raise ArgumentError(f"{path} has two devices named {device.name!r}: names must differ")
        devices.append(device)
        stated = {name: table[name] for name in _SPECS if name in table}
        if stated:
            missing = [name for name in _SPECS if name not in stated]
            if missing:
                raise ArgumentError(
                    f"device {device.name!r} of {path} states {', '.join(stated)} but not {', '.join(missing)}: state both or neither"
                )
            specs[device.name] = DeviceSpecs(**stated)
    links: dict[tuple[str, str], Link] = {}
    link_tables = content.get("links", [])
    if not isinstance(link_tables, list):
        raise ArgumentError(f"links of {path} must be [[links]] tables")
    for table in link_tables:
        _refuse_unknown(table, ("source", "target", "bandwidth", "latency"), f"a [[links]] table of {path}")
        ends = (table.get("source"), table.get("target"))
        if not all(isinstance(end, str) for end in ends):
            raise ArgumentError(f"a [[links]] table of {path} must name a source and a target device: it has {ends}")
        if ends in links:
            raise ArgumentError(f"{path} has two links from {ends[0]!r} to {ends[1]!r}")
        links[ends] = Link(**{name: value for name, value in table.items() if name not in ("source", "target")})
    return ClusterFile(
        devices=tuple(devices), links=check_links(links, [device.name for device in devices]), specs=specs
    )


def _refuse_unknown(table: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(table, dict):
        raise ArgumentError(f"{where} is not a table")
    for name in table:
        if name not in known:
            raise ArgumentError(f"{where} has {name!r}, which is not one of {', '.join(known)}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

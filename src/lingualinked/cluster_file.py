"""Reads what is said of a cluster before it starts: in a cluster file (TOML), or by addresses of daemons.

Knows the form of the file; `Device`, `Link` and `DeviceSpecs` check their own fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lingualinked.address import parse_address, parse_advertised
from lingualinked.checks import check_positive
from lingualinked.device import Device, Link, check_links
from lingualinked.device_specs import DeviceSpecs
from lingualinked.errors import ArgumentError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterDescription:
    """What is said of a cluster before it starts."""

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], Link] = dataclasses.field(default_factory=dict)
    specs: Mapping[str, DeviceSpecs] = dataclasses.field(
        default_factory=dict
    )  # of the devices that state them, by name
    advertise: str | None = None  # where devices reach the caller
    timeout_s: float | None = None


Devices = int | str | os.PathLike[str] | Sequence[Device] | ClusterDescription
"""What a user may say of the devices to run on; a text is "auto", the path of a cluster file, or addresses of daemons."""

SPECS = tuple(field.name for field in dataclasses.fields(DeviceSpecs))
OF_DEVICE = tuple(field.name for field in dataclasses.fields(Device))
OF_LINK = tuple(field.name for field in dataclasses.fields(Link))
OF_CLUSTER = ("devices", "links", "advertise", "timeout_s")


def read_description(text: str | os.PathLike[str]) -> ClusterDescription:
    """Read a cluster file, given by its path, or one or several ``tcp://HOST:PORT#PUBLIC-KEY`` of daemons."""
    if isinstance(text, str) and text.lstrip().startswith("tcp://"):
        return ClusterDescription(devices=_devices_at(text.replace(",", " ").split()))
    if isinstance(text, str) and not text.endswith(".toml") and not Path(text).is_file():
        raise ArgumentError(
            f"devices={text!r} is neither 'auto', nor a cluster file (which ends in .toml), nor the address of a daemon "
            "(tcp://HOST:PORT)"
        )
    return read_cluster_file(Path(text))


def read_cluster_file(path: Path) -> ClusterDescription:
    """Read a cluster file; an error names the file, the table and the value that can't be used."""
    # 1) read the file
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArgumentError(f"no cluster file at {str(path)!r}: {error}") from error
    # 2) read what holds for all of the cluster
    _refuse_unknown(content, OF_CLUSTER, str(path))
    advertise, timeout_s = content.get("advertise"), content.get("timeout_s")
    with _named(str(path)):
        if advertise is not None:
            parse_advertised(advertise, "advertise")
        if timeout_s is not None:
            check_positive(timeout_s, "timeout_s")
    # 3) read its devices and their stated rates
    devices: list[Device] = []
    specs: dict[str, DeviceSpecs] = {}
    for where, table in _tables(content, "devices", path):
        _refuse_unknown(table, (*OF_DEVICE, *SPECS), where)
        if "name" not in table:
            raise ArgumentError(f"{where} has no name")
        with _named(where):
            device = Device(**{name: _frozen(value) for name, value in table.items() if name in OF_DEVICE})
            check_distinct(device, devices)
            devices.append(device)
            stated = {name: table[name] for name in SPECS if name in table}
            missing = [name for name in SPECS if name not in stated]
            if stated and missing:
                raise ArgumentError(
                    f"device {device.name!r} states {', '.join(stated)} but not {', '.join(missing)}: state both or neither"
                )
            if stated:
                specs[device.name] = DeviceSpecs(**stated)
    if not devices:
        raise ArgumentError(f"{path} has no [[devices]]: a cluster needs at least one")
    # 4) read its links
    links: dict[tuple[str, str], Link] = {}
    for where, table in _tables(content, "links", path):
        _refuse_unknown(table, ("source", "target", *OF_LINK), where)
        source, target = table.get("source"), table.get("target")
        if not isinstance(source, str) or not isinstance(target, str):
            raise ArgumentError(f"{where} must name a source and a target device: it has {(source, target)}")
        if (source, target) in links:
            raise ArgumentError(f"{where} is a second link from {source!r} to {target!r}: leave one out")
        with _named(where):
            links[source, target] = Link(**{name: value for name, value in table.items() if name in OF_LINK})
    with _named(str(path)):
        check_links(links, [device.name for device in devices])
    return ClusterDescription(
        devices=tuple(devices), links=links, specs=specs, advertise=advertise, timeout_s=timeout_s
    )


def check_distinct(device: Device, others: Sequence[Device]) -> None:
    """Check that no other device has the name or the address of one."""
    for other in others:
        if device.name == other.name:
            raise ArgumentError(f"two devices are named {device.name!r}: names must differ")
        if device.address is not None and device.address == other.address:
            raise ArgumentError(
                f"devices {other.name!r} and {device.name!r} have one address, {device.address}: a daemon runs one worker for a "
                "caller; leave one of them out"
            )


def _devices_at(addresses: Sequence[str]) -> tuple[Device, ...]:
    """Return a device for each ``tcp://HOST:PORT`` or ``tcp://HOST:PORT#PUBLIC-KEY``, named after its host."""
    devices: list[Device] = []
    for text in addresses:
        at, has_key, key = text.partition("#")  # the first one: a key may hold more of them
        address = parse_address(at, "devices")
        is_taken = address.host == "caller" or any(address.host == each.name for each in devices)
        name = str(address).removeprefix("tcp://") if is_taken else address.host
        device = Device(name=name, address=at, server_key=key if has_key else None)
        check_distinct(device, devices)
        devices.append(device)
    return tuple(devices)


def _tables(content: Mapping[str, Any], name: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each table of an array with the words by which errors name it."""
    tables = content.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ArgumentError(f"{name} of {path} must be [[{name}]] tables")
    for number, table in enumerate(tables, start=1):
        label = f" ({table['name']!r})" if isinstance(table.get("name"), str) else ""
        yield f"[[{name}]] table {number}{label} of {path}", table


def _refuse_unknown(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(known)}"
            raise ArgumentError(f"{where} has an unknown field {name!r}: {hint}")


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Add to an error where the value stands that it names."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

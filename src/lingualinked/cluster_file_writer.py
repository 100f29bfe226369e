"""Writes a cluster file (TOML), which `cluster_file` reads as the same cluster.

Knows the form of the file; not where its figures come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from lingualinked.cluster_file import OF_DEVICE, OF_LINK, SPECS, ClusterDescription
from lingualinked.device import Device, Link
from lingualinked.errors import ArgumentError
from lingualinked.whole_file import write_whole_file


def write_cluster_file(
    path: Path,
    cluster: ClusterDescription,
    *,
    comments: Mapping[str, Sequence[str]] | None = None,
    head: Sequence[str] = (),
    replace: bool = False,
) -> None:
    """Write a cluster file, with lines of comment at its head and about devices by name.

    Raises ArgumentError if there is a file and ``replace`` is false, or if it can't be written.
    """
    document = tomlkit.document()
    # 1) what holds for all of the cluster
    for line in head:
        document.add(tomlkit.comment(line))
    for name in ("advertise", "timeout_s"):
        value = getattr(cluster, name)
        if value is not None:
            document.add(name, value)
    # 2) devices
    devices = tomlkit.aot()
    for device in cluster.devices:
        specs = cluster.specs.get(device.name)
        table = _table({**_stated(device, OF_DEVICE), **({} if specs is None else _stated(specs, SPECS))})
        for line in (comments or {}).get(device.name, ()):
            table.add(tomlkit.comment(line))
        devices.append(table)
    document.add("devices", devices)
    # 3) links
    if cluster.links:
        links = tomlkit.aot()
        for (source, target), link in cluster.links.items():
            links.append(_table({"source": source, "target": target, **_stated(link, OF_LINK)}))
        document.add("links", links)
    try:
        if path.exists() and not replace:
            raise ArgumentError(f"there is a file {str(path)!r} already, which is not overwritten: choose another name")
        write_whole_file(path, tomlkit.dumps(document))
    except OSError as error:
        raise ArgumentError(f"no cluster file can be written to {str(path)!r}: {error}") from error


def _stated(record: Device | Link | Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a record that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(record)}
    values = {name: getattr(record, name) for name in names}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not None and value != defaults[name]
    }


def _table(values: Mapping[str, Any]) -> Any:
    table = tomlkit.table()
    for name, value in values.items():
        table.add(name, value)
    return table

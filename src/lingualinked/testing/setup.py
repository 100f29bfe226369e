"""What a test asks for with ``@pytest.mark.lingualinked(...)``: devices, a model, and how long both are kept.

Knows pytest's markers; starts nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest

if TYPE_CHECKING:
    from lingualinked.device import Device

MARK = "lingualinked"
Scope = Literal["session", "package", "module", "class", "function"]
DEFAULT_DEVICES = 2
_OF_CLUSTER = ("links", "timeout_s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One cluster and the model on it.

    Parameters
    ----------
    devices : int, str, PathLike or tuple of Device
        A number of local workers with one thread each, the devices, or a cluster file.
    cluster_arguments, model_arguments : mapping of str to object
        Of `FaultyCluster` and of ``ShardedModel.from_pretrained``.
    scope : {"session", "package", "module", "class", "function"}
        How long both are kept.
    """

    devices: int | str | os.PathLike[str] | tuple[Device, ...] = DEFAULT_DEVICES
    cluster_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scope: Scope = "function"

    @property
    def label(self) -> str:
        """How it appears in the name of a test."""
        if isinstance(self.devices, int | str):
            return f"devices={self.devices}"
        if isinstance(self.devices, os.PathLike):
            return f"devices={os.fspath(self.devices)}"
        return f"devices={'+'.join(device.name for device in self.devices)}"


def setups_of(item: pytest.Item | pytest.Function) -> list[Setup]:
    """Read the markers of a test, those of its class and module included; return a setup for each run.

    Each argument counts as the nearest marker states it.

    Raises
    ------
    UsageError
        If a marker can't be understood.
    """
    asked: dict[str, Any] = {}
    for mark in reversed(list(item.iter_markers(MARK))):
        if mark.args:
            raise pytest.UsageError(
                f"{item.nodeid}: @pytest.mark.{MARK}({', '.join(map(repr, mark.args))}) has arguments without names: "
                "write devices=, model=, scope=, or an argument of ShardedModel.from_pretrained by its name"
            )
        asked |= mark.kwargs
    if "cluster" in asked:
        raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.{MARK}(cluster=...): describe the cluster by devices=")
    scope = asked.pop("scope", "function")
    if scope not in get_args(Scope):
        raise pytest.UsageError(f"{item.nodeid}: scope={scope!r} of @pytest.mark.{MARK}: give one of {get_args(Scope)}")
    variants = _variants(asked.pop("devices", DEFAULT_DEVICES), item.nodeid)
    of_cluster = {name: asked.pop(name) for name in _OF_CLUSTER if name in asked}
    return [Setup(devices=each, cluster_arguments=of_cluster, model_arguments=asked, scope=scope) for each in variants]


def _variants(devices: object, test: str) -> list[int | str | os.PathLike[str] | tuple[Device, ...]]:
    """Return each number or list of devices that a test is to run with."""
    from lingualinked.cluster_file import read_description  # only once a test needs devices
    from lingualinked.device import Device
    from lingualinked.errors import ArgumentError

    def variant_of(value: object) -> int | str | os.PathLike[str] | tuple[Device, ...] | None:
        if isinstance(value, str | os.PathLike):
            try:
                if value != "auto":
                    read_description(value)
                return value
            except ArgumentError as error:
                raise pytest.UsageError(f"{test}: {error}") from error
        if isinstance(value, int):
            return value if value >= 1 and not isinstance(value, bool) else None
        found = tuple(value) if isinstance(value, Sequence) else ()
        return found if found and all(isinstance(each, Device) for each in found) else None

    whole = variant_of(devices)
    variants = (
        [whole]
        if whole or isinstance(devices, str) or not isinstance(devices, Sequence)
        else [variant_of(each) for each in devices]
    )
    if not variants or None in variants:
        raise pytest.UsageError(
            f"{test}: devices={devices!r} of @pytest.mark.{MARK}: give a positive number, a list of lingualinked.Device or a "
            "cluster file, or a list of these, for one run with each"
        )
    return [each for each in variants if each is not None]

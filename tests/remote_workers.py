"""Workers on this machine that behave as if their caller were on another host: its files are fetched, not read.

Knows clusters and folders; nothing of what is compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

import lingualinked as ll
from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.weights import file_supplies
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.describing import describe_contents
from lingualinked.protocol.boot import Boot, WeightFolders
from lingualinked.protocol.messages import decode
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

CACHE_BYTES = 1 << 30


@dataclasses.dataclass
class Traffic:
    """What the caller has sent to its workers and received from them."""

    num_bytes: int = 0  # of messages about files
    num_messages: Counter[str] = dataclasses.field(default_factory=Counter)

    def clear(self) -> None:
        self.num_bytes = 0
        self.num_messages.clear()

    def count(self, payload: bytes, num_bytes: int) -> None:
        kind = type(decode(payload)).__name__
        self.num_messages[kind] += 1
        if kind in ("FindFiles", "FilesFound", "ShareFiles", "FetchPart", "FilePart", "StopSharing"):
            self.num_bytes += num_bytes


def hide_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make workers on other hosts look for the caller's files where they are not: a host's own copy has another path."""

    def describe_elsewhere(spec: ModelSpec, *, verify: bool = False) -> ModelSpec:
        files = [dataclasses.replace(file, path=f"/on/another/host{file.path}") for file in spec.files]
        return dataclasses.replace(describe_contents(spec, verify=verify), files=tuple(files))

    monkeypatch.setattr(file_supplies, "_describe", describe_elsewhere)


@contextlib.contextmanager
def remote_cluster(
    devices: Sequence[ll.Device],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    models: Mapping[str, Path] | None = None,
    caches: Mapping[str, Path] | None = None,
    cache_bytes: int = CACHE_BYTES,
    **arguments: Any,
) -> Iterator[ll.Cluster]:
    """Make a cluster whose workers have caches of their own in a folder, and perhaps checkpoints."""
    boot = Cluster._boot

    def remote_boot(cluster: Cluster, device: ll.Device, *rest: Any) -> Boot:
        folders = WeightFolders(
            models=str(models[device.name]) if models and device.name in models else None,
            cache=str((caches or {}).get(device.name, folder / device.name)),
            cache_bytes=cache_bytes,
        )
        return msgspec.structs.replace(boot(cluster, device, *rest), weight_folders=folders)

    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "_boot", remote_boot)
        hide_files(patch)
        with ll.Cluster(devices, **arguments) as cluster:
            cluster._engine.fetching = frozenset(device.name for device in cluster.devices)
            yield cluster


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """Count what the caller's mailbox sends and receives."""
    traffic = Traffic()
    send, receive = ZmqMailbox.send, ZmqMailbox.receive

    def counted_send(mailbox: ZmqMailbox, name: str, payload: bytes, tensors: Any = ()) -> int:
        num_bytes = send(mailbox, name, payload, tensors)
        traffic.count(payload, num_bytes)
        return num_bytes

    def counted_receive(mailbox: ZmqMailbox, timeout_s: float | None) -> Any:
        delivery = receive(mailbox, timeout_s)
        if delivery is not None:
            traffic.count(delivery.payload, delivery.num_bytes)
        return delivery

    monkeypatch.setattr(ZmqMailbox, "send", counted_send)
    monkeypatch.setattr(ZmqMailbox, "receive", counted_receive)
    return traffic

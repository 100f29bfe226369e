"""Devices that a cluster is asked to run workers on are checked together and filled in."""

from __future__ import annotations

import pytest

import lingualinked as ll
from lingualinked.cluster.devices import check_added_device, describe_cluster
from lingualinked.processor import usable_cores

NAS = ll.Device(name="nas", address="tcp://nas:5600", accelerator="cuda:7")


def test_what_a_daemon_has_is_not_filled_in_from_here() -> None:
    local, remote = describe_cluster([ll.Device(name="here"), NAS]).devices
    assert local.threads == usable_cores()  # the one local worker shares them with nobody
    assert remote == NAS
    assert check_added_device(NAS, [local]) == NAS


def test_a_daemon_runs_one_worker_for_a_caller() -> None:
    again = ll.Device(name="box", address="tcp://NAS:5600")
    with pytest.raises(ll.ArgumentError, match="'nas' and 'box' have one address, tcp://nas:5600"):
        describe_cluster([NAS, again])
    with pytest.raises(ll.ArgumentError, match="'nas' and 'box' have one address"):
        check_added_device(again, [NAS])

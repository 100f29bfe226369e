"""Devices that a cluster is asked to run workers on are checked together and filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

import lingualinked as ll
from lingualinked.cluster.workers.devices import check_added_device, describe_cluster
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
    assert check_added_device(again, [NAS], ended={"nas"}) == again  # as after a restart of the daemon
    with pytest.raises(ll.ArgumentError, match="a device named 'nas' is in this cluster already"):
        check_added_device(NAS, [NAS], ended={"nas"})


def test_a_relay_has_a_daemon_and_something_to_do() -> None:
    here = [ll.Device(name="here"), ll.Device(name="there")]
    hub = ll.Device(name="hub", address="tcp://hub:5600")
    relayed = ll.Link(relay="hub")
    assert describe_cluster([*here, NAS, hub], links={("here", "nas"): relayed}).links == {("here", "nas"): relayed}
    assert describe_cluster([NAS, hub], links={("nas", "caller"): relayed})
    with pytest.raises(
        ll.ArgumentError, match=r"relay='there' .* is a local device, which has no daemon: choose from \['nas'\]"
    ):
        describe_cluster([*here, NAS], links={("here", "nas"): ll.Link(relay="there")})
    with pytest.raises(ll.ArgumentError, match=r"both ends are on this machine"):
        describe_cluster([*here, hub], links={("here", "there"): relayed})


def test_arguments_take_precedence_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(
        "timeout_s = 5\nadvertise = 'a'\n[[devices]]\nname = 'x'\n[[devices]]\nname = 'y'\n"
        "[[links]]\nsource = 'x'\ntarget = 'y'\nlatency = '1ms'\n[[links]]\nsource = 'y'\ntarget = 'x'\nlatency = '1ms'\n"
    )
    described = describe_cluster(path, links={("x", "y"): ll.Link(latency="2ms")}, advertise="b", timeout_s=6)
    assert (described.advertise, described.timeout_s) == ("b", 6)
    assert [link.latency_s for link in described.links.values()] == [2e-3, 1e-3]
    kept = describe_cluster(path)
    assert (kept.advertise, kept.timeout_s) == ("a", 5)

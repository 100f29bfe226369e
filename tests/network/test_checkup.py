"""`lingualinked doctor --cluster` between hosts: an asymmetric link shows, and a device that is away is a row with its reason."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lingualinked.cluster_file import ClusterDescription, read_cluster_file
from lingualinked.cluster_file_writer import write_cluster_file
from lingualinked.device import CALLER, Device
from network import namespaces
from network.hosts import Network

pytestmark = [pytest.mark.process, pytest.mark.slow]

NEW_KEY = "import json\nfrom lingualinked.transport.keys.key_files import make_key\nprint(json.dumps(make_key('default').public))"
DOCTOR = "import sys\nfrom lingualinked.cli import app\napp(['doctor', '--quiet', *sys.argv[1:]])"


def test_an_asymmetric_link_and_a_device_that_is_away(network: Network) -> None:
    laptop, nas = network.add("laptop"), network.add("nas", rate="100mbit")
    slow_up = ("tbf", "rate", "20mbit", "burst", "64kb", "latency", "50ms")
    namespaces.tc("-n", nas.namespace, "qdisc", "replace", "dev", "eth0", "root", *slow_up)
    # 1) a daemon that lets the laptop in, and a cluster file with it and a host that is not there
    client = laptop.start_python(NEW_KEY).hear()
    command = (sys.executable, "-m", "lingualinked.worker", "--bind", "tcp://0.0.0.0:5600", "--threads", "1")
    daemon = nas.start(*command, "--authorize", client)
    assert daemon.process.stdout is not None
    server_key = daemon.process.stdout.readline().decode().strip().partition("#")[2]
    devices = tuple(
        Device(name=name, address=f"tcp://{host}:5600", server_key=server_key)
        for name, host in (("nas", nas.address), ("away", laptop.address.rpartition(".")[0] + ".99"))
    )
    write_cluster_file(laptop.home / "cluster.toml", ClusterDescription(devices=devices))
    # 2) the checkup
    done = subprocess.run(
        [
            *("ip", "netns", "exec", laptop.namespace, sys.executable, "-c", DOCTOR),
            *("--cluster", "cluster.toml", "--toml", "measured.toml"),
        ],
        cwd=laptop.home,
        env=laptop.environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"away: .*'away' at tcp://", done.stdout)
    assert re.search(r"caller -> nas +yes", done.stdout)
    assert re.search(r"away -> nas +no", done.stdout)
    # 3) what was written, which plans are made from
    measured = read_cluster_file(laptop.home / "measured.toml")
    assert list(measured.specs) == ["nas"]
    up, down = (measured.links[ends].bandwidth_bytes_per_s * 8 for ends in (("nas", CALLER), (CALLER, "nas")))
    assert 14e6 < up < 21e6
    assert 2 * up < down < 105e6

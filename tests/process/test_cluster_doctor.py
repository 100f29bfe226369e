"""`lingualinked doctor --cluster` shows every device and every link, whatever fails, and writes what `plan` takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lingualinked as ll
from daemons import DaemonProcess, running_daemons
from lingualinked.cli import app
from lingualinked.cluster_file import ClusterDescription, read_cluster_file
from lingualinked.cluster_file_writer import write_cluster_file

pytestmark = [pytest.mark.process, pytest.mark.slow]

SLOW = ll.Device(name="slow", threads=1, slowdown=2.0, bandwidth="400Mbit/s", latency="2ms")


@pytest.fixture(scope="module")
def daemon(shared_fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running_daemons(tmp_path_factory.mktemp("daemons")) as daemons, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATEN_CPU_CAPABILITY", "default")
        daemon = daemons.start("--memory", "2GiB")
        patch.undo()
        yield daemon


def doctor(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, ["doctor", *map(str, arguments)])


def cluster_file(folder: Path, *devices: ll.Device) -> Path:
    path = folder / "cluster.toml"
    write_cluster_file(path, ClusterDescription(devices=devices))
    return path


def test_devices_here_and_elsewhere_are_measured_and_planned_with(
    daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, measured = cluster_file(tmp_path, SLOW, daemon.device("nas")), tmp_path / "measured.toml"
    found = doctor("--cluster", path, "--toml", measured, "--model", ll.sample_model(), "--quiet")
    assert found.exit_code == 0, found.output
    # 1) what is shown
    links = re.findall(r"(\w+ -> \w+) +yes +([\d.]+) (µs|ms) +([\d,]+|-)", found.output)
    assert {ends for ends, *_ in links} == {
        f"{a} -> {b}" for a in ("caller", "slow", "nas") for b in ("caller", "slow", "nas") if a != b
    }
    assert f"nas {daemon.address} SHA256:" in " ".join(found.output.split())
    assert re.search(r"not exact: mixed instruction sets \(.*'slow'.*'nas'|.*'nas'.*'slow'", found.output)
    assert f"on other hosts: nas at {daemon.address}" in found.output
    assert "With one more like" in found.output
    assert "Plan: 8 layers" in found.output
    # 2) what is written
    described = read_cluster_file(measured)
    assert [device.name for device in described.devices] == ["slow", "nas"]
    assert described.specs.keys() == {"slow", "nas"}
    assert all(device.memory is not None and device.threads == 1 for device in described.devices)
    assert described.devices[1].address == daemon.address
    planned = CliRunner().invoke(app, ["plan", ll.sample_model(), "--devices", str(measured)])
    assert planned.exit_code == 0, planned.output


def test_what_fails_hides_nothing_else(daemon: DaemonProcess, tmp_path: Path) -> None:
    away = ll.Device(name="away", address="tcp://127.0.0.1:9", server_key=daemon.server_key)
    found = doctor("--cluster", cluster_file(tmp_path, SLOW, away), "--quiet", "--toml", tmp_path / "measured.toml")
    assert found.exit_code == 1
    assert re.search(r"away: .*tcp://127.0.0.1:9", found.output)
    assert re.search(r"caller -> slow +yes", found.output)
    assert re.search(r"slow -> away +no", found.output)
    assert [device.name for device in read_cluster_file(tmp_path / "measured.toml").devices] == ["slow"]


def test_a_model_that_does_not_fit_is_told_with_the_bytes_that_are_missing(tmp_path: Path) -> None:
    small = ll.Device(name="small", threads=1, memory="64MiB")
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,'
        ' "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 1000, "torch_dtype": "bfloat16"}'
    )
    found = doctor("--cluster", cluster_file(tmp_path, small), "--quiet", "--model", tmp_path / "large")
    assert found.exit_code == 1
    assert "does not fit" in found.output
    assert re.search(r"MiB short", found.output)


def test_options_that_need_a_cluster_are_refused_without_one() -> None:
    found = doctor("--model", "x")
    assert found.exit_code == 1
    assert "--cluster" in found.output

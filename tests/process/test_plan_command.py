"""``lingualinked plan`` prints plans: from measurement, from what is on disk, from stated specs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lingualinked as ll
from families import save_tiny
from lingualinked.cli.app import app
from lingualinked.cluster.cluster import Cluster
from lingualinked.sharded.loading.progress import DeviceProgress

pytestmark = pytest.mark.process

STATED = """
[[devices]]
name = "desktop"
memory = "1GiB"
flops = "2TFLOP/s"
memory_bandwidth = "50GB/s"

[[devices]]
name = "phone"
memory = "1GiB"
bandwidth = "100Mbit/s"
flops = "100GFLOP/s"
memory_bandwidth = "10GB/s"
"""
SHAPE = ["--prompt-tokens", "8", "--new-tokens", "8"]


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(STATED)
    return path


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(Cluster, "__init__", refuse)


def plan(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_table_from_stated_figures(tiny_llama: str, cluster_file: Path, no_workers: None) -> None:
    result = plan(tiny_llama, "--devices", cluster_file, *SHAPE, "--explain")
    assert result.exit_code == 0, result.output
    assert "desktop" in result.output
    assert "Predicted:" in result.output


def test_a_map_of_what_each_stage_consumes(tiny_llama: str, cluster_file: Path, no_workers: None) -> None:
    result = plan(tiny_llama, "--devices", cluster_file, *SHAPE, "--map")
    assert result.exit_code == 0, result.output
    assert "Transmission map" in result.output
    assert "input_ids" in result.output


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_plan_fits_the_terminal(
    width: int, tiny_llama: str, cluster_file: Path, no_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = plan(tiny_llama, "-d", cluster_file, *SHAPE, "--explain")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width


def test_a_config_alone_suffices(tiny_llama: str, cluster_file: Path, no_workers: None, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(tiny_llama) / "config.json").read_bytes())
    result = plan(folder, "-d", cluster_file, *SHAPE, "--json")
    assert result.exit_code == 0, result.output
    assert ll.Plan.from_json(result.stdout).num_layers == 4
    assert json.loads(result.stdout)["profile"]["devices"][0]["hardware"] == "stated specs"


def test_a_picture(
    matplotlib_fonts: None, tiny_llama: str, cluster_file: Path, no_workers: None, tmp_path: Path
) -> None:
    result = plan(tiny_llama, "-d", cluster_file, *SHAPE, "--plot", tmp_path / "plan.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_measured_once_then_read(tiny_llama: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, list[int]] = {}
    monkeypatch.setattr(
        DeviceProgress, "update", lambda _, device, num_done: shown.setdefault(device, []).append(num_done)
    )
    first = plan(tiny_llama, "-d", 2, *SHAPE, "--json")
    assert first.exit_code == 0, first.output
    assert "(4 layers of 1 kind, float32) on worker-0, worker-1: a prefill of 8 tokens, decode steps" in first.stderr
    assert "The profile is kept on disk unless its times are doubtful." in first.stderr
    assert "state flops and memory_bandwidth of every device in a cluster file" in first.stderr
    # A prefill, and decode steps early and late in an answer; of the first two layers, and of the last one.
    assert shown == {device: [1, 2, 3, 4, 5, 6] for device in ("worker-0", "worker-1")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(Cluster, "__init__", refuse)
    again = plan(tiny_llama, "-d", 2, *SHAPE, "--json")
    assert again.stdout == first.stdout
    assert "Measuring" not in again.stderr
    assert "Measuring" not in plan(tiny_llama, "-d", 2, *SHAPE, "--quiet").stderr


def test_figures_for_some_devices_only_are_refused(tiny_llama: str, no_workers: None, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(f"{STATED}\n[[devices]]\nname = 'tablet'\n")
    result = plan(tiny_llama, "-d", path, *SHAPE)
    assert result.exit_code == 1
    assert "memory_bandwidth for desktop, phone but not for tablet: state them for every device" in result.output


def test_texts_longer_than_the_learned_positions(
    cluster_file: Path, no_workers: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = save_tiny("gpt2", torch.float32, tmp_path_factory.mktemp("gpt2"))
    for devices in (2, cluster_file):
        result = plan(path, "-d", devices, "--prompt-tokens", 60, "--new-tokens", 5)
        assert result.exit_code == 1
        assert "prompt_tokens=60 and new_tokens=5 of the workload exceed the 64 positions" in result.output


def test_what_fits_nowhere_is_refused_before_a_worker_starts(
    tiny_llama: str, no_workers: None, tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("[[devices]]\nname = 'small'\nmemory = '20KiB'\n")
    result = plan(tiny_llama, "-d", path, *SHAPE)
    assert result.exit_code == 1
    assert "what would fit: one more device of at least" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "none.toml"], "no cluster file at"),
        (["--objective", "speed"], "objective='speed'"),
        (["--objective", "energy"], "needs watts="),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--num-sessions", "1000000"], "what would fit"),
        (["--plot", "/no/such/folder/plan.png"], "there is no folder"),
        (["--plot", "plan.odd"], "matplotlib can't write .odd files"),
    ],
)
def test_what_can_not_be_planned(
    matplotlib_fonts: None, tiny_llama: str, cluster_file: Path, no_workers: None, arguments: list[str], message: str
) -> None:
    result = plan(tiny_llama, "-d", cluster_file, *SHAPE, *arguments)
    assert result.exit_code == 1
    assert message in result.output

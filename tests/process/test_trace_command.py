"""``lingualinked trace`` runs sessions at once and writes what the pipeline did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lingualinked.cli.app import app
from lingualinked.cluster.cluster import Cluster

pytestmark = pytest.mark.process


def trace(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


def slices(path: Path, measured: str) -> list[dict[str, Any]]:
    """The arguments of all slices of a trace that state a measure: those of steps total_s, those of stages compute_s."""
    arguments = [each["args"] for each in json.loads(path.read_text())["traceEvents"] if each["ph"] == "X"]
    return [each for each in arguments if measured in each]


def test_sessions_of_the_bundled_model(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = trace("-d", 2, "--requests", 3, "-n", 4, "-o", path)
    assert result.exit_code == 0, result.output
    assert str(path) in result.stdout
    assert "https://ui.perfetto.dev" in result.stdout
    assert "Times of a decode step in each stage, median of 9" in result.stdout
    assert "3 sessions at once" in result.stdout
    steps = slices(path, "total_s")
    assert len(steps) == 12
    assert len({each["session"] for each in steps}) == 3
    computed = slices(path, "compute_s")
    assert len(computed) == 12 * len({each["device"] for each in computed})  # the plan may do without one of the two


def test_prompts_for_a_checkpoint_on_a_cluster_from_a_file(tiny_llama: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(tiny_llama).iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer.save_pretrained(folder)
    cluster_file = tmp_path / "cluster.toml"
    cluster_file.write_text('[[devices]]\nname = "here"\n[[devices]]\nname = "there"\nlatency = "1ms"\n')
    path = tmp_path / "trace.json"
    result = trace("the fox", "--model", folder, "-d", cluster_file, "-n", 2, "-r", 1, "-o", path)
    assert result.exit_code == 0, result.output
    assert "in 1 session." in result.stdout
    assert {each["device"] for each in slices(path, "compute_s")} <= {"here", "there"}
    assert len(slices(path, "total_s")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "none.toml"], "no cluster file at"),
        (["-o", "."], "is a folder"),
        (["one", "two", "-r", "1"], "is less than the 2 prompts"),
    ],
)
def test_what_can_not_be_traced(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(Cluster, "__init__", refuse)
    result = trace(*arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_what_can_not_be_loaded(tiny_llama: str, tmp_path: Path) -> None:
    result = trace("--model", tiny_llama, "-o", tmp_path / "trace.json")
    assert result.exit_code == 1
    assert "no tokenizer at" in result.output

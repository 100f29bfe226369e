"""The benchmarks beside the package: run by one command, on the devices that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import lingualinked as ll
from benchmarks import page, start
from benchmarks.__main__ import app
from benchmarks.gpu import GraphLoop
from families import tiny_model
from lingualinked.cli import app as lingualinked_app
from lingualinked.cli.bench.machine import MachineClock
from lingualinked.cli.bench.measurement import Measurement, Report

CLUSTER = '[[devices]]\nname = "here"\nthreads = 1\n[[devices]]\nname = "there"\nlatency = "1ms"\n'
NAMES = (
    "measure",
    "page",
    "start",
    "watching",
    "hops",
    "fetching",
    "predict",
    "planner",
    "soak",
    "rebalance",
    "products",
)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_name_and_says_what_it_measures(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert name in CliRunner().invoke(app, ["--help"]).stdout


def test_devices_of_the_start_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(f'{CLUSTER}[[links]]\nsource = "here"\ntarget = "there"\nbandwidth = "1Gbit/s"\n')
    scripts: list[str] = []

    def timed(script: str, _: Any = None) -> dict[str, float]:
        scripts.append(script)
        return {"first": 1.0, "second": 1.0}

    monkeypatch.setattr(start, "_timed", timed)
    result = CliRunner().invoke(app, ["start", "-d", str(path), "--repeats", "1"])
    assert result.exit_code == 0, result.output
    clusters = [line.partition("= ")[2] for script in scripts for line in script.splitlines() if "ll.Cluster(" in line]
    assert len(clusters) == 5
    for made in clusters:

        class Taken:
            def __init__(self, devices: Any, links: Any) -> None:
                assert [device.name for device in devices] == ["here", "there"]
                assert links["here", "there"].bandwidth == "1Gbit/s"

        names = {"ll": type("Names", (), {"Cluster": Taken}), "Device": ll.Device, "Link": ll.Link}
        eval(made, names)


def test_the_loop_that_graphs_are_measured_with_decodes_as_transformers_does() -> None:
    model = tiny_model("llama", torch.float32)
    loop = GraphLoop(model, "cpu", 9 + 6 - 1)
    for seed in range(2):
        ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(seed))
        arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, cache_implementation="static", **arguments)
        assert torch.equal(loop.generate(ids, **arguments), expected)


def test_the_page_has_the_tables_of_its_reports() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "run `python -m benchmarks page`"
    assert set(re.findall(r"<!-- report: ([\w-]+) -->", text)) == set(page.RUNS)


def test_a_table_is_made_from_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(page, "REPORTS", tmp_path)
    measured = Measurement(what="decode", unit="tokens/s", values={"sharded": [30.0], "uncut-2": [20.0]})
    report = Report(command="lingualinked bench decode", machine=MachineClock().describe(), measurements=(measured,))
    (tmp_path / "decode.json").write_text(report.to_json())
    text = page.filled("before\n<!-- report: decode -->\nold\n<!-- end -->\nafter")
    assert "`lingualinked bench decode`" in text
    assert "| decode: sharded | 30.0 tokens/s (30.0 to 30.0) |  |" in text
    assert "| uncut-2 | 20.0 tokens/s (20.0 to 20.0) | 1.50 (1.50 to 1.50) |" in text
    assert "old" not in text
    assert page.filled(text) == text


@pytest.mark.parametrize("name", page.RUNS)
def test_the_command_of_a_report_has_options_that_exist(name: str) -> None:
    arguments = page.RUNS[name].split()
    command = get_command(lingualinked_app).commands["bench"].commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context("bench", arguments[1:])

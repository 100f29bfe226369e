"""A measurement takes turns, compares round by round, and is kept with its machine."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lingualinked as ll
from lingualinked.cli.app import app
from lingualinked.cli.bench.machine import Machine, MachineClock
from lingualinked.cli.bench.measurement import Measurement, Report, take_turns
from lingualinked.cli.bench.models import BenchModels, BenchOptions, uncut_dummy
from lingualinked.cli.bench.peers.llama_cpp import write_gguf
from lingualinked.cli.bench.shapes import SHAPES
from lingualinked.cluster.cluster import Cluster

MACHINE = Machine(
    processor="AMD EPYC",
    capability="AVX512",
    num_cores=2,
    memory_bytes=24 << 30,
    accelerators=(),
    versions={"lingualinked": "0.1.0"},
    commit="0c1e570",
    date="2026-11-27",
    load_average=(0.5, 1.0),
)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        def measure() -> float:
            order.append(name)
            return float(len(order))

        return measure

    values = take_turns({"a": side("a"), "b": side("b")}, 2)
    assert "".join(order) == "abbaab"
    assert values == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_gains_are_above_one_where_the_first_side_is_better() -> None:
    rates = Measurement(what="speed", unit="tokens/s", values={"ours": [10, 20], "theirs": [5, 5]})
    assert list(rates.gain("theirs").values) == [2, 4]
    times = Measurement(what="time", unit="ms", values={"ours": [10, 20], "theirs": [5, 5]})
    assert list(times.gain("theirs").values) == [0.5, 0.25]


def test_a_report_is_a_table_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    measured = Measurement(
        what="decode",
        unit="tokens/s",
        values={"sharded": [30.123456], "uncut-2": [20.0]},
        predicted=31.0,
        at_least={"uncut-2": 1.5},
        notes=("Tokens are equal.",),
    )
    report = Report(command="lingualinked bench decode", machine=MACHINE, measurements=(measured,))
    text = report.to_rows().to_text()
    assert re.search(r"^decode: sharded +30\.1 tokens/s \(30\.1 to 30\.1\) +31\.0 tokens/s$", text, re.MULTILINE)
    assert re.search(r"^ +uncut-2 +20\.0 tokens/s .* 1\.51 \(1\.51 to 1\.51\) +1\.5$", text, re.MULTILINE)
    assert "2 cores of AMD EPYC (AVX512)" in text
    assert "load average 0.5 before and 1.0 after" in text
    read = Report.from_json(report.to_json())
    assert read.measurements[0].values["sharded"] == [30.123]
    assert read.machine == MACHINE


def test_this_machine_is_described() -> None:
    machine = MachineClock().describe()
    assert machine.versions["torch"] == torch.__version__
    assert machine.num_cores >= 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["decode", "--against", "uncut-3"], "'uncut-3' must be one of"),
        (["decode", "--against", "llama.cpp", "--llama-cpp", "/nowhere"], "build llama.cpp"),
        (["throughput", "--against", "one-step"], "not measured by this command"),
        (["prefill", "--against", "lingualinked"], "not measured by this command"),
        (["prefill", "--chunk-size", "whole", "--against", "one-step"], "not measured by this command"),
        (["load", "--shortest", "9", "--longest", "8"], "--longest 8"),
        (["decode", "--plan", "none.json"], "--plan 'none.json'"),
        (["decode", "--json", "/nowhere/report.json"], "--json"),
        (["prefill", "-d", "tcp://host:1#" + "x" * 40, "--slowdown", "2"], "--slowdown 2 has no effect"),
    ],
)
def test_what_can_not_be_measured_is_refused_first(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "__init__", lambda *_, **__: pytest.fail("a cluster was started"))
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert complaint in result.stderr


def test_a_number_of_devices_shares_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.cli.bench.models._cores", lambda: [2, 3, 5, 7])
    devices = BenchModels(BenchOptions(devices="2")).description.devices
    assert [(device.threads, device.cpus) for device in devices] == [(2, (2, 3)), (2, (5, 7))]
    devices = BenchModels(BenchOptions(devices="8")).description.devices
    assert {(device.threads, device.cpus) for device in devices} == {(1, None)}
    devices = BenchModels(BenchOptions(devices="2", slowdown=4)).description.devices
    assert {(device.cpus, device.slowdown) for device in devices} == {(None, 4.0)}


@pytest.fixture
def uncut_in_place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The uncut model in place of the sharded one: nothing is started."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ll.sample_model())
    model.plan = ll.Plan.from_spans([("worker-0", 0, 3), ("worker-1", 3, 8)])
    cluster = SimpleNamespace(devices=(ll.Device(name="worker-0", threads=1),))
    monkeypatch.setattr(ll, "Cluster", lambda *_, **__: contextlib.nullcontext(cluster))
    monkeypatch.setattr(ll.ShardedModel, "from_pretrained", lambda *_, **__: contextlib.nullcontext(model))
    return model


def test_a_report_is_printed_and_written(uncut_in_place: Any, tmp_path: Path) -> None:
    path, shape = tmp_path / "report.json", ["--prompt-tokens", 3, "--new-tokens", 3, "--repeats", 1]
    modes = "uncut-1,lingualinked"
    result = run("decode", ll.sample_model(), "--rows", 2, "--against", modes, *shape, "--json", path)
    assert result.exit_code == 0, result.output
    assert "decode, 2 rows of 3 + 3 tokens: sharded" in result.stdout
    assert "Tokens of 2 rows are equal to the uncut model's with 1 thread." in result.stdout
    report = Report.from_json(path.read_bytes())
    assert list(report.measurements[0].values) == ["sharded", *modes.split(",")]
    assert report.command.endswith(
        "--rows 2 --prompt-tokens 3 --new-tokens 3 --against uncut-1,lingualinked --repeats 1"
    )


def test_shapes_are_models() -> None:
    from transformers import AutoConfig

    for name, shape in SHAPES.items():
        config = AutoConfig.for_model(**shape)
        assert config.architectures == shape["architectures"], name
        assert config.num_hidden_layers in (12, 22, 24, 32)


def test_an_uncut_model_of_a_shape_has_the_weights_of_its_stages(tmp_path: Path) -> None:
    import json

    small = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["160m"], **small, "vocab_size": 64}))
    first, second = (uncut_dummy(str(tmp_path)) for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    path = tmp_path / "model.gguf"
    write_gguf(first.config, path)
    gguf = pytest.importorskip("gguf")
    tensors = {each.name: each.tensor_type.name for each in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 2 * 9 + 3
    assert (tensors["output.weight"], tensors["output_norm.weight"]) == ("BF16", "F32")

"""The command line says what it is, refuses early, and ends in one message and a status."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import lingualinked as ll
import lingualinked.cli
from lingualinked.cli import doctor_command
from lingualinked.cli.app import app
from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.workers.devices import describe_cluster
from lingualinked.model.exact import linear_speed
from lingualinked.sharded.loading.progress import DeviceProgress

CLUSTER = '[[devices]]\nname = "here"\nthreads = 1\n[[devices]]\nname = "there"\nlatency = "1ms"\n'
STARTS = {
    "demo": ["demo"],
    "generate": ["generate", ll.sample_model(), "Once"],
    "plan": ["plan", ll.sample_model()],
    "bench": ["bench", "decode", ll.sample_model()],
    "trace": ["trace"],
}


class StartedError(ll.LingualinkedError):
    """Raised where a cluster would have been started."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The names of the devices of each cluster that a command wants to start; none is."""
    asked: list[tuple[str, ...]] = []

    def refuse(_: Cluster, devices: Any, **__: Any) -> None:
        asked.append(tuple(device.name for device in describe_cluster(devices).devices))
        raise StartedError

    monkeypatch.setattr(Cluster, "__init__", refuse)
    return asked


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"lingualinked {importlib.metadata.version('lingualinked')}\n")


def test_the_room_lists_every_command() -> None:
    names = re.search("lingualinked (.*)``", lingualinked.cli.__doc__ or "")
    assert names is not None
    assert sorted(names[1].split(" | ")) == sorted(get_command(app).commands)


@pytest.mark.parametrize("command", STARTS)
def test_devices_are_a_number_or_a_file(
    command: str, started: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no profile is known there
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    for devices, names in ((path, ("here", "there")), (2, ("worker-0", "worker-1"))):
        result = run(*STARTS[command], "-d", devices)
        assert isinstance(result.exception, SystemExit), result.output
        assert started.pop() == names
    for devices in ("none.toml", "0", "-1", ""):
        result = run(*STARTS[command], "-d", devices)
        assert result.exit_code == 1
        assert "Error: " in result.stderr
        assert not started


@pytest.mark.parametrize(("command", "option"), [("trace", "--output"), ("plan", "--plot")])
def test_a_file_that_can_not_be_written_is_refused_first(
    command: str, option: str, started: list[tuple[str, ...]], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    for path, reason in (
        (tmp_path / "new" / "file.png", "there is no folder"),
        (blocked / "file.png", "there is no folder"),
        (tmp_path, "is a folder"),
        (Path("/proc/file.png"), "no file can be created"),
    ):
        result = run(*STARTS[command], option, path)
        assert result.exit_code == 1
        assert f"{option} '{path}'" in result.stderr
        assert reason in result.stderr
    result = run(*STARTS["plan"], "--plot", tmp_path / "plan.odd")
    assert "choose one of" in result.stderr
    assert not started


def test_what_would_have_no_effect_is_refused(started: list[tuple[str, ...]]) -> None:
    for arguments, option in (
        (["--rebalance", "-d", "4"], "--devices 4"),
        (["--rebalance", "-n", "4"], "--max-new-tokens 4"),
        (["--seconds", "9"], "--seconds 9"),
    ):
        result = run("demo", *arguments)
        assert result.exit_code == 1
        assert f"{option} has no effect" in result.stderr
    assert not started


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--toml", "x.toml"], "--cluster"),
        (["--dtype", "bfloat16"], "--cluster"),
        (["--cluster", "2", "--num-sessions", "4"], "--model"),
    ],
)
def test_options_of_a_checkup_that_would_have_no_effect_are_refused(arguments: list[str], needed: str) -> None:
    result = run("doctor", *arguments)
    assert result.exit_code == 1
    assert f"has no effect without {needed}" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sample", "--temperature", "0"],
        ["--sample", "--temperature", "-1"],
        ["--sample", "--temperature", "nan"],
        ["--temperature", "2"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["-n", "0"],
    ],
)
def test_options_of_sampling_are_checked(arguments: list[str], started: list[tuple[str, ...]]) -> None:
    result = run(*STARTS["generate"], *arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code in (1, 2)
    assert arguments[-2] in result.stderr
    assert not started


def public_errors() -> list[type[ll.LingualinkedError]]:
    public = [getattr(ll, name) for name in ll.__all__]
    return [each for each in public if isinstance(each, type) and issubclass(each, ll.LingualinkedError)]


@pytest.mark.parametrize("kind", public_errors())
def test_every_error_is_one_message(kind: type[ll.LingualinkedError], monkeypatch: pytest.MonkeyPatch) -> None:
    if issubclass(kind, ll.WorkerError):
        error: ll.LingualinkedError = kind("phone", "ValueError: odd", "Traceback (most recent call last):\n  in f")
    elif issubclass(kind, ll.DaemonError):
        error = kind("phone", "tcp://phone:5600", "odd")
    elif issubclass(kind, ll.UnreachableError):
        error = kind("phone", "nas", "tcp://nas:5601", "odd")
    elif kind in (ll.UncuttableModelError, ll.WorkerDiedError):
        error = kind("phone", "odd")  # type: ignore[call-arg]
    else:
        error = kind("odd")

    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor_command, "run_doctor", fail)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"{kind.__name__}: ")
    assert "odd" in result.stderr
    assert "raceback" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_interrupt_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_command, "run_doctor", interrupt)
    result = run("doctor")
    assert (result.exit_code, result.output) == (130, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ll.Plan(stages=(ll.PlannedStage(device="a", start=0, end=2, weight_bytes=100),))
    for stream, shown, is_drawn in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with DeviceProgress.of_loading(plan, shown=shown) as bars:
            bars.update("a", 50)
        assert bool(stream.getvalue()) is is_drawn


@pytest.mark.parametrize("command", ["demo", "generate", "trace"])
def test_quiet_shows_no_progress_bars(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(*_: Any, progress: bool, **__: Any) -> None:
        asked.append(progress)
        raise StartedError

    monkeypatch.setattr(ll.ShardedModel, "from_pretrained", load)
    monkeypatch.setattr("lingualinked.cli.demo_command.find_or_fit_plan", lambda *_: ll.Plan.from_spans([("a", 0, 8)]))
    monkeypatch.setattr(ll, "Cluster", lambda *_, **__: contextlib.nullcontext(enter_result=Cluster))
    for quiet in ([], ["--quiet"]):
        assert run(*STARTS[command], *quiet).exit_code == 1
    assert asked == [True, False]


def test_an_answer_has_no_special_tokens_unless_all_of_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ll.sample_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    monkeypatch.setattr(ll, "Cluster", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(ll.ShardedModel, "from_pretrained", lambda *_, **__: contextlib.nullcontext(model))
    prompt = "Once upon a time there lived"
    generated = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)[0]
    whole = tokenizer.decode(generated)
    arguments = ["generate", path, prompt, "-n", 20]
    assert run(*arguments, "--raw").stdout == f"{whole}\n"
    answer = run(*arguments).stdout
    assert whole == f"{tokenizer.bos_token}{prompt}{answer.rstrip()}"


def test_doctor_says_which_kernel_each_dtype_gets() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for dtype in ("bfloat16", "float32", "float16"):
        assert re.search(rf"^{dtype}, 1 row +\S.* +[\d.]+ +\d+%$", result.stdout, re.MULTILINE), result.stdout
        assert re.search(rf"^{dtype}, 8 rows +\S.* +[\d.]+ +\d+%$", result.stdout, re.MULTILINE), result.stdout
    assert "One thread reads memory at" in result.stdout
    assert re.search(r"norms of one row: bfloat16 (norm\.c|torch's own)", result.stdout)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_tables_fit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = linear_speed.LinearSpeed(dtype=torch.bfloat16, num_rows=8, kernel="few_rows.c", bytes_per_s=2e10)
    monkeypatch.setattr(linear_speed, "measure_linears", lambda: [speed])
    monkeypatch.setattr(linear_speed, "measure_memory", lambda: 3e10)
    monkeypatch.setenv("COLUMNS", str(width))
    result = run("doctor")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "cores that this process may use" in result.stdout
    assert os.environ["COLUMNS"] == str(width)

"""What a probe finds is read again by later processes: of the same processor, libraries and settings alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lingualinked.model.exact import kept_probes
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.process.torch_settings import read_torch_settings, torch_settings
from lingualinked.rounding import Rounding


@pytest.fixture(autouse=True)
def folder(nothing_is_kept: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(kept_probes, "_can_keep", lambda: not read_torch_settings())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process()
    yield tmp_path / "lingualinked"
    new_process()


def new_process() -> None:
    kept_probes._results.cache_clear()
    kept_probes._file_name.cache_clear()


class Probed:
    """A probe as another process has it, and how often it ran."""

    def __init__(self, result: object, kind: type = str) -> None:
        self.num_runs = 0
        new_process()

        def probe(*arguments: object) -> object:
            self.num_runs += 1
            return result

        self.probe = keep_result(kind)(probe)


@pytest.mark.parametrize(("kind", "result"), [(str, "few_rows.c 512"), (bool, False), (Rounding, Rounding("a b", 2))])
def test_another_process_reads_what_the_first_found(kind: type, result: object) -> None:
    first, second = Probed(result, kind), None
    assert first.probe(torch.bfloat16, 1, True) == first.probe(torch.bfloat16, 1, True) == result
    second = Probed("", kind)
    assert second.probe(torch.bfloat16, 1, True) == result
    assert (first.num_runs, second.num_runs) == (1, 0)
    second.probe(torch.bfloat16, 2, True)
    assert second.num_runs == 1


def test_what_two_processes_find_is_kept_side_by_side() -> None:
    first, second = Probed("first"), Probed("second")
    first.probe(1)
    second.probe(2)
    third = Probed("third")
    assert [third.probe(number) for number in (1, 2, 3)] == ["first", "second", "third"]


@pytest.mark.parametrize("change", ["variable", "processor", "torch", "kernel"])
def test_elsewhere_all_is_found_out_again(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Probed("old").probe(1)
    if change == "variable":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    elif change == "processor":
        monkeypatch.setattr(kept_probes, "describe_processor", lambda: "another")
    elif change == "torch":
        monkeypatch.setattr(torch.version, "git_version", "another")
    else:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/native.py").touch()
        monkeypatch.setattr(kept_probes.native, "__file__", str(tmp_path / "kernels/native.py"))
    assert Probed("new").probe(1) == "new"


def test_with_other_settings_of_torch_nothing_is_read_or_written() -> None:
    Probed("default").probe(1)
    with torch_settings({"deterministic": 1}):
        assert Probed("changed").probe(1) == "changed"
    assert Probed("").probe(1) == "default"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"probe 1": 7}', b'{"probe 1": {"a": 1}}'])
def test_a_damaged_file_is_replaced(content: bytes, folder: Path) -> None:
    Probed("old").probe(1)
    [file] = folder.iterdir()
    file.write_bytes(content)
    assert Probed("new").probe(1) == "new"
    assert Probed("").probe(1) == "new"


def test_a_folder_that_can_not_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Probed("found").probe(1) == "found"
    assert Probed("again").probe(1) == "again"


def test_what_a_probe_could_not_find_out_is_not_kept() -> None:
    assert Probed(None).probe(1) is None
    assert Probed("found").probe(1) == "found"


def test_a_file_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(kept_probes, "_MAX_RESULTS", 3)
    probed = Probed("found")
    assert [probed.probe(number) for number in range(9)] == ["found"] * 9
    [file] = folder.iterdir()
    assert file.read_bytes().count(b"found") == 3
    assert file.stat().st_mode & 0o077 == 0

"""``lingualinked cache``, as the owner of a device uses it whose disk fills up."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lingualinked.cli.app import app
from lingualinked.model.spec import FileContent
from lingualinked.model.weight_files.weight_cache import WeightCache


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["cache", *arguments])
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightCache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return WeightCache(tmp_path / "lingualinked" / "weights")


def fill(cache: WeightCache, number: int, model: str) -> FileContent:
    content = FileContent(
        name=f"{number}.safetensors", num_bytes=1 << 20, header_bytes=9, header_digest="", fingerprint=f"{number:032x}"
    )
    with contextlib.closing(cache.open_file(content, model)) as file:
        file.write(0, bytes(1 << 19))
        file.commit()
    return content


def test_models_are_listed_and_removed(cache: WeightCache) -> None:
    assert run("list").startswith(f"{cache.folder}: 0 B")
    fill(cache, 1, "llama")
    fill(cache, 2, "gpt2")
    fill(cache, 3, "llama")
    shown = [line.split() for line in run("list").splitlines()]
    assert ["llama", "2", "1.0", "MiB", "2.0", "MiB"] in [words[:6] for words in shown]
    assert ["gpt2", "1", "512", "KiB", "1.0", "MiB"] in [words[:6] for words in shown]
    assert run("clear").startswith("Freed 1.5 MiB in ")
    assert cache.entries() == []


def test_what_is_in_use_is_left(cache: WeightCache) -> None:
    content = fill(cache, 1, "llama")
    with contextlib.closing(cache.open_file(content, "llama")):
        assert run("clear").rstrip().endswith("KiB are in use")
    assert len(cache.entries()) == 1


def test_a_name_of_a_caller_does_not_control_the_terminal(cache: WeightCache) -> None:
    fill(cache, 1, "\x1b]0;evil\x07\nforged")
    assert "?]0;evil??forged" in run("list")
    assert "\x1b" not in run("list")

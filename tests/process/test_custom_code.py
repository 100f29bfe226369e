"""A checkpoint whose code lies beside it is cut as others are, where the caller and the workers' hosts allow its code."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from custom_checkpoints import write_checkpoint
from daemons import Daemons, running_daemons

pytestmark = pytest.mark.process

IDS = torch.tensor([[0, 0, 3, 4, 5], [7, 8, 9, 10, 11]])
MASK = (IDS > 0).long()
SPANS = [("a", 0, 1), ("b", 1, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("custom") / "own"


@pytest.fixture(scope="module")
def uncut(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
        yield write_checkpoint(folder)


@pytest.fixture
def daemons(shared_fork_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemons]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running_daemons(tmp_path) as daemons:
        yield daemons


def open_on(cluster: ll.Cluster, folder: Path) -> ll.ShardedModel:
    plan = ll.Plan.from_spans(SPANS)
    return ll.ShardedModel.from_pretrained(folder, cluster=cluster, plan=plan, trust_remote_code=True, progress=False)


def answer(model: Any) -> torch.Tensor:
    tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    assert isinstance(tokens, torch.Tensor)
    return tokens


def test_it_gives_the_tokens_of_the_uncut_model_and_moves(shared_fork_server: None, folder: Path, uncut: Any) -> None:
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "ab"]) as cluster, open_on(cluster, folder) as model:
        assert type(model).__name__ == "OwnForCausalLM"
        with torch.no_grad():
            ours, theirs = (each(IDS, attention_mask=MASK) for each in (model, uncut))
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(answer(model), answer(uncut))
        model.rebalance(ll.Plan.from_spans([("a", 0, 3), ("b", 3, 4)]))
        assert torch.equal(answer(model), answer(uncut))


def test_without_trust_it_is_refused_by_name(shared_fork_server: None, folder: Path, uncut: Any) -> None:
    with pytest.raises(ll.LingualinkedError, match="trust_remote_code=True"):
        ll.ShardedModel.from_pretrained(folder, devices=1, progress=False)


def test_another_host_runs_its_own_copy_where_it_allows_that(
    daemons: Daemons, folder: Path, uncut: Any, tmp_path: Path
) -> None:
    refusing = daemons.start()
    with (
        ll.Cluster([ll.Device(name="a", threads=1), refusing.device("b")]) as cluster,
        pytest.raises(ll.LingualinkedError, match="--trust-remote-code"),
    ):
        open_on(cluster, folder)
    models = tmp_path / "models"
    shutil.copytree(folder, models / "copy")
    allowing = daemons.start("--trust-remote-code", "--models", str(models))
    with (
        ll.Cluster([ll.Device(name="a", threads=1), allowing.device("b")]) as cluster,
        open_on(cluster, folder) as model,
    ):
        assert torch.equal(answer(model), answer(uncut))
    (models / "copy" / "layers_own.py").write_text("raise AssertionError('this ran')")
    altered = daemons.start("--trust-remote-code", "--models", str(models))
    with (
        ll.Cluster([ll.Device(name="a", threads=1), altered.device("b")]) as cluster,
        pytest.raises(ll.LingualinkedError, match=r"layers_own\.py in .* differs"),
    ):
        open_on(cluster, folder)

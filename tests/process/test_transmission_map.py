"""A model of which tensors skip stages is planned, loaded, moved and shown by what its own forward says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from architectures import default_config, spec_of_config
from lingualinked.model.proving.small_model import make_small_model

pytestmark = pytest.mark.process

PART = "model.embed_tokens_per_layer"
IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = default_config("gemma4_text")
    return make_small_model(config, spec_of_config(config, "float32"), tmp_path_factory.mktemp("gemma4")).whole


def answer(model: Any) -> torch.Tensor:
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert isinstance(tokens, torch.Tensor)
    return tokens


@pytest.mark.parametrize("num_sessions", [1, 4000])
def test_a_part_is_held_or_its_output_is_sent(
    shared_fork_server: None, uncut: Any, tmp_path: Path, num_sessions: int
) -> None:
    uncut.save_pretrained(tmp_path / "gemma4")
    devices = [ll.Device(name=name, threads=1) for name in "ab"]
    with ll.Cluster(devices) as cluster:
        profile = ll.profile_model(tmp_path / "gemma4", cluster, workload=ll.Workload(prompt_tokens=9, new_tokens=6))
        shortcuts = {shortcut.name: shortcut for shortcut in profile.model.transmission.shortcuts}
        assert shortcuts[PART].part_bytes > 0
        plan = ll.solve(profile, workload=ll.Workload(prompt_tokens=9, new_tokens=6, num_sessions=num_sessions))
        assert plan.held == (() if num_sessions == 1 else (PART,))
        spans = ll.Plan.from_spans([("a", 0, 1), ("b", 1, plan.num_layers)], profile=plan.profile)
        with ll.ShardedModel.from_pretrained(tmp_path / "gemma4", cluster=cluster, plan=spans, progress=False) as model:
            consumed = [each.name for each in model.transmission_map.stages[1].consumed]
            assert (PART in consumed) == (num_sessions == 1)
            assert ("input_ids" in consumed) == (num_sessions > 1)
            assert torch.equal(answer(model), answer(uncut))
            model.rebalance(
                ll.Plan.from_spans([("a", 0, plan.num_layers - 1), ("b", plan.num_layers - 1, plan.num_layers)])
            )
            assert torch.equal(answer(model), answer(uncut))

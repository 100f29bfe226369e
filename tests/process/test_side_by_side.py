"""Several models on the same workers, used from several threads at once, do not notice each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import reference, save_tiny
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

CUTS = {
    "gpt2": [("a", 0, 2), ("b", 2, 4)],
    "llama": [("b", 0, 1), ("a", 1, 3), ("c", 3, 4)],
    "mistral": [("a", 0, 3), ("d", 3, 4)],
}
MODES = ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2})


def test_models_side_by_side(place: Callable[..., Any], tmp_path: Path) -> None:
    folders = {family: save_tiny(family, torch.float32, tmp_path / family) for family in CUTS}
    sharded = {family: place(folders[family], spans) for family, spans in CUTS.items()}
    jobs = [(family, torch.tensor([[1, 5 + number, 40]]), mode) for family in CUTS for number, mode in enumerate(MODES)]

    def generate(model: PreTrainedModel, ids: torch.Tensor, mode: dict[str, Any]) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=20, eos_token_id=None, **mode)

    with ThreadPoolExecutor(len(jobs)) as pool:
        ours = list(pool.map(lambda job: generate(sharded[job[0]], *job[1:]), jobs))
    for (family, ids, mode), tokens in zip(jobs, ours, strict=True):
        assert torch.equal(tokens, generate(reference(folders[family]), ids, mode))
    for family, model in sharded.items():
        wait_until(lambda model=model, family=family: num_sessions(model) == [0] * len(CUTS[family]))


def test_one_model_assists_another(place: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    model, assistant = place(folder, CUTS["llama"]), place(folder, CUTS["gpt2"])
    ids = torch.tensor([[1, 5, 40]])
    arguments = {"max_new_tokens": 20, "eos_token_id": None}
    tokens = model.generate(ids, assistant_model=assistant, **arguments)
    whole = reference(folder)
    assert torch.equal(tokens, whole.generate(ids, assistant_model=whole, **arguments))
    wait_until(lambda: num_sessions(model) + num_sessions(assistant) == [0] * 5)

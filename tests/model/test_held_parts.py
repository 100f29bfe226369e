"""A part that every stage holds, in place of its output that is sent, gives the same bits; and its weights are counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from architectures import default_config, spec_of_config
from lingualinked.model.cutting.parts import build_meta, parts_of
from lingualinked.model.proving.small_model import SmallModel, make_small_model
from lingualinked.model.proving.trial import _compare
from lingualinked.model.stages.stage import Stage
from lingualinked.transmission import INPUT_IDS

pytestmark = pytest.mark.equality


@pytest.mark.parametrize(("model_type", "part"), [("gemma4_text", "model.embed_tokens_per_layer")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_every_stage_holds_is_not_sent(model_type: str, part: str, dtype: str, tmp_path: Path) -> None:
    config = default_config(model_type)
    small = make_small_model(config, spec_of_config(config, dtype), tmp_path)
    parts = parts_of(small.spec, build_meta(small.spec))
    sent = next(shortcut for shortcut in parts.transmission.shortcuts if shortcut.name == part)
    held = parts.holding([part])
    assert sent.part_bytes > 0
    assert held.span_bytes(1, 2) == parts.span_bytes(1, 2) + sent.part_bytes
    assert held.span_bytes(0, held.num_layers) == parts.span_bytes(0, parts.num_layers)
    num_seen = 0

    def watch(_: SmallModel, stages: list[Stage]) -> None:
        nonlocal num_seen
        for stage in stages[1:]:
            num_seen += 1
            assert part not in stage.used_shortcuts
            assert INPUT_IDS in stage.used_shortcuts
            assert stage.weight_bytes == held.span_bytes(stage.start, stage.end)

    spec = dataclasses.replace(small.spec, parts=held)
    trial = _compare(dataclasses.replace(small, spec=spec), per_layer=True, watch=watch)
    assert not trial.difference
    assert num_seen >= 3

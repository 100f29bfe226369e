"""Configurations as on the hub, in small, are exact when cut: of models with a tower for pictures too, used for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig

from architectures import spec_of_config
from hub_configs import HUB_CONFIGS
from lingualinked.model.proving.trial import try_cutting

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def read(name: str, folder: Path) -> transformers.PreTrainedConfig:
    (folder / "config.json").write_text(json.dumps(HUB_CONFIGS[name]))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_a_checkpoint_as_on_the_hub_is_exact(name: str, tmp_path: Path) -> None:
    config = read(name, tmp_path)
    trial = try_cutting(config, spec_of_config(config, "bfloat16"), per_layer=True)
    assert not trial.difference
    assert {"prefill", "decode", "continue", "padded", "moved"} <= set(trial.exact)

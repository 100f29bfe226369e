"""Settings of torch that differ from the defaults are read, applied elsewhere, and restored."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingualinked.model.process.torch_settings import read_torch_settings, torch_settings

SETTINGS = {
    "autocast.cpu": "float16",
    "default_dtype": "float64",
    "deterministic": 1,
    "flush_denormal": True,
    "sdp.flash": False,
    "sdp.math": False,
    "sdp.reduced": True,
    "float32.matmul": "medium",
    "float32.mkldnn.matmul": "bf16",
    "mkldnn": False,
    "mkldnn.deterministic": True,
}


def test_a_fresh_interpreter_has_the_defaults() -> None:
    script = "from lingualinked.model.process.torch_settings import read_torch_settings; print(read_torch_settings())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "{}\n"


def test_contexts_of_torch_are_read() -> None:
    with torch.autocast("cpu", dtype=torch.float16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        settings = read_torch_settings()
    assert settings["autocast.cpu"] == "float16"
    assert settings["sdp.math"] is False
    assert "sdp.flash" not in settings
    with torch.autocast("cpu", enabled=False):
        assert read_torch_settings() == {}


@pytest.mark.parametrize("names", [[name] for name in SETTINGS] + [list(SETTINGS)], ids=str)
def test_are_in_force_inside_alone(names: list[str]) -> None:
    settings = {name: SETTINGS[name] for name in names}
    with torch_settings(settings):
        assert read_torch_settings().items() >= settings.items()
        with torch_settings({}):
            assert read_torch_settings().items() >= settings.items()
    assert read_torch_settings() == {}


def test_are_taken_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="within"), torch_settings(SETTINGS):
        raise RuntimeError("within")
    assert read_torch_settings() == {}


@pytest.mark.parametrize(
    "settings", [{"another": 1}, {"default_dtype": "load"}, {"autocast.cpu": "Tensor"}, {"flush_denormal": 2}]
)
def test_what_torch_does_not_know_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises((ValueError, RuntimeError)), torch_settings(settings):  # type: ignore[arg-type]
        pass
    assert read_torch_settings() == {}

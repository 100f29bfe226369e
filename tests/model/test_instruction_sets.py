"""Stages are exact under any instruction set that oneDNN and torch can be told to use, as the unsharded model does.

Three settings are tried, with two families drawn for each; all of both with ``LINGUALINKED_PROOF=all``.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from families import FAMILIES

TESTS = Path(__file__).parents[1]
SETTINGS = {
    **{
        f"oneDNN {name}": {"ONEDNN_MAX_CPU_ISA": name}
        for name in ("AVX512_CORE", "AVX512_CORE_VNNI", "AVX2", "DEFAULT")
    },
    **{f"torch {name}": {"ATEN_CPU_CAPABILITY": name} for name in ("avx2", "default")},
}


TRIES_ALL = os.environ.get("LINGUALINKED_PROOF") == "all"


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS if TRIES_ALL else ["oneDNN AVX2", "oneDNN AVX512_CORE", "torch avx2"])
def test_cut_is_exact(setting: str) -> None:
    names = ["llama-wide", *random.Random(setting).sample(sorted(FAMILIES), 2)]
    if TRIES_ALL:
        names = sorted(FAMILIES)
    run = subprocess.run(
        [sys.executable, TESTS / "exact_families.py", *names],
        env={**os.environ, **SETTINGS[setting], "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "different:", run.stdout

"""What tests of kernels and of their probes share.

Knows torch and the probes; no kernel.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lingualinked.model.exact import kept_probes, product_probe


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """What a test makes a probe find is not kept for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_probes, "_can_keep", lambda: False)
        yield


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def probed_with_few_outputs(exact_kernel: Any) -> Iterator[None]:
    """Let a cached probe of products begin anew, with few outputs, and forget what it found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product_probe, "PROBED_ELEMENTS", 2 * product_probe.MIN_ELEMENTS)
        exact_kernel.cache_clear()
        yield
        exact_kernel.cache_clear()


def run_elsewhere(script: str, folder: Path, **variables: str) -> None:
    """Run a script that imports tests of a folder, under environment variables that choose instruction sets."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

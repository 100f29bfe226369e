"""Tiny checkpoints on disk, each written once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from families import save_tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """Return the folder of a family's tiny checkpoint."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (family, dtype)
        if key not in folders:
            folders[key] = save_tiny(family, dtype, tmp_path_factory.mktemp(family))
        return folders[key]

    return folder

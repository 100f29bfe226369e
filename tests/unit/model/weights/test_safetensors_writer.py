"""A file that is written tensor by tensor is the one that the safetensors library writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lingualinked.model.weights.safetensors_writer import write_file

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "c": torch.ones(5, dtype=torch.float64)[::2],
    "d": torch.ones((), dtype=torch.bfloat16),
    "e": torch.zeros(0, 3, dtype=torch.bfloat16),
    "f": torch.tensor([True, False, True]),
}
ORDER = ("c", "b", "d", "e", "f")  # wide dtypes first


def test_equals_the_librarys(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    write_file(tmp_path / "ours", {name: TENSORS[name] for name in ORDER}, TENSORS.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def read(name: str) -> Tensor:
        if name == "d":
            raise ValueError("no")
        return TENSORS[name]

    with pytest.raises(ValueError, match="no"):
        write_file(tmp_path / "file", {name: TENSORS[name] for name in ORDER}, read)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from lingualinked.errors import CheckpointError
from lingualinked.model.safetensors_file import SafetensorsFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {
        "matrix": torch.randn(7, 5),
        "half": torch.randn(3).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(9),
        "mask": torch.tensor([True, False]),
        "byte": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "some.safetensors", metadata={"format": "pt"})
    return tmp_path / "some.safetensors"


def test_tensors_are_read_bit_for_bit_into_aligned_memory(path: Path) -> None:
    from safetensors.torch import load_file

    file = SafetensorsFile(str(path))
    expected = load_file(path)
    assert set(file.entries) == set(expected)
    for name, tensor in expected.items():
        ours = file.read(name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert ours.data_ptr() % 64 == 0
    file.close()


def test_opening_reads_the_header_alone(path: Path) -> None:
    file = SafetensorsFile(str(path))
    assert file.header_bytes == 8 + int.from_bytes(path.read_bytes()[:8], "little")


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "the file has 0"),
        (b"\x05\0", "the file has 2"),
        (b"\xff" * 9, "header claims"),
        ((20).to_bytes(8, "little") + b"{" * 20, "malformed"),
        (with_header([]), "malformed"),
        (with_header({"a": 3}), "malformed"),
        (with_header({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), "malformed"),
        (with_header({"a": ENTRY | {"data_offsets": [0, 9]}}, b"\0" * 9), "can't take up bytes 0 to 9"),
        (with_header({"a": ENTRY | {"shape": [-2]}}, b"\0" * 8), "can't take up bytes"),
        (with_header({"a": ENTRY}, b"\0" * 7), "announces"),
        (with_header({"a": ENTRY}, b"\0" * 9), "announces"),
    ],
)
def test_damaged_files_are_refused_with_the_cause(content: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad.safetensors is truncated or not a safetensors file: .*{cause}"):
        SafetensorsFile(str(path))


@given(st.binary(max_size=64))
def test_no_content_is_met_with_another_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.safetensors"
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            SafetensorsFile(str(path))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(with_header({"a": ENTRY | {"dtype": "F4"}}, b"\0" * 8))
    with pytest.raises(CheckpointError, match=r"a in .*odd.safetensors has the dtype F4"):
        SafetensorsFile(str(path))


@pytest.mark.parametrize(
    ("break_it", "cause"), [(Path.unlink, "is missing"), (lambda path: (path.unlink(), path.mkdir()), "can't be read")]
)
def test_what_is_no_file_is_refused(break_it: Callable[[Path], object], cause: str, path: Path) -> None:
    break_it(path)
    with pytest.raises(CheckpointError, match=f"some.safetensors {cause}"):
        SafetensorsFile(str(path))


def test_a_file_that_shrinks_afterwards_is_refused(path: Path) -> None:
    file = SafetensorsFile(str(path))
    os.truncate(path, file.header_bytes + 2)
    with pytest.raises(CheckpointError, match="ends within the tensor 'matrix'"):
        file.read("matrix")
    file.close()

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from lingualinked.errors import CheckpointError
from lingualinked.model.weights.safetensors_file import FileChangedError, SafetensorsFile, identify_file


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

    file = SafetensorsFile(identify_file(str(path)))
    expected = load_file(path)
    assert set(file.entries) == set(expected)
    for name, tensor in expected.items():
        ours = file.read_tensor(name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert ours.data_ptr() % 64 == 0
    file.close()


def test_opening_reads_the_header_alone(path: Path) -> None:
    file = SafetensorsFile(identify_file(str(path)))
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
        SafetensorsFile(identify_file(str(path)))


@given(st.binary(max_size=64))
def test_no_content_is_met_with_another_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.safetensors"
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            SafetensorsFile(identify_file(str(path)))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(with_header({"a": ENTRY | {"dtype": "F4"}}, b"\0" * 8))
    with pytest.raises(CheckpointError, match=r"a in .*odd.safetensors has the dtype F4"):
        SafetensorsFile(identify_file(str(path)))


@pytest.mark.parametrize(
    ("break_it", "cause"), [(Path.unlink, "is missing"), (lambda path: (path.unlink(), path.mkdir()), "can't be read")]
)
def test_what_is_no_file_is_refused(break_it: Callable[[Path], object], cause: str, path: Path) -> None:
    break_it(path)
    with pytest.raises(CheckpointError, match=f"some.safetensors {cause}"):
        SafetensorsFile(identify_file(str(path)))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def replace_and_set_back_its_times(path: Path) -> None:
    status = path.stat()
    replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite_and_set_back_its_times(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def point_elsewhere(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    path.unlink()
    path.symlink_to(other)


CHANGES = [
    Path.unlink,
    replace,
    replace_and_set_back_its_times,
    rewrite_and_set_back_its_times,
    point_elsewhere,
    lambda path: os.truncate(path, 9),
    lambda path: path.write_bytes(b""),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_takes_a_files_place_is_not_read(change: Callable[[Path], object], path: Path) -> None:
    known = identify_file(str(path))
    with contextlib.closing(SafetensorsFile(known)) as file:
        change(path)
        with pytest.raises(FileChangedError, match=r"some.safetensors (is missing|has been replaced or written to)"):
            file.read_tensor("matrix")
    with pytest.raises(FileChangedError):
        SafetensorsFile(known)


@pytest.mark.parametrize("change", [rewrite_and_set_back_its_times, lambda path: os.truncate(path, 900), replace])
def test_a_file_that_changes_while_it_is_read(change: Callable[[Path], object], path: Path) -> None:
    class ChangingMeanwhile(io.FileIO):
        def readinto(self, target: memoryview) -> int:
            num_read = super().readinto(target[:4])
            change(path)
            return num_read

    with contextlib.closing(SafetensorsFile(identify_file(str(path)))) as file:
        file._file = ChangingMeanwhile(path)
        with pytest.raises(FileChangedError, match="has been replaced or written to"):
            file.read_tensor("matrix")


def test_reading_and_backing_up_a_file_is_no_change(path: Path) -> None:
    with contextlib.closing(SafetensorsFile(identify_file(str(path)))) as file:
        shutil.copy2(path, path.with_name("backup"))
        path.read_bytes()
        assert file.read_tensor("counts").tolist() == list(range(9))

"""Describes the content of a checkpoint's files, so that a copy on another host can be told from another checkpoint.

Knows files of safetensors and of a config; no models, no hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lingualinked.disk_cache import read_cached, write_cached
from lingualinked.model.spec import CheckpointFile, FileContent, ModelSpec
from lingualinked.model.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from lingualinked.model.weights.safetensors_file import TensorEntry

_SAMPLE_BYTES = 64
_DIGEST_BYTES = 16
_READ_BYTES = 1 << 22
_WITHOUT_EFFECT = ("_name_or_path", "transformers_version")  # in a config


def describe_contents(spec: ModelSpec, *, verify: bool = False) -> ModelSpec:
    """Return a specification that says what is in its files, for workers on other hosts.

    Parameters
    ----------
    spec : ModelSpec
        A model whose files can be read here.
    verify : bool
        Whether to hash all bytes too, so that workers compare every tensor that they load. The digests are kept on disk.

    Raises
    ------
    CheckpointError
        If a file has changed or can't be read.
    """
    if not spec.files:
        return spec
    contents = tuple(describe_file(file, verify=verify) for file in spec.files)
    return dataclasses.replace(spec, contents=contents, config_digest=digest_config(Path(spec.files[0].path).parent))


def describe_file(file: CheckpointFile, *, verify: bool = False) -> FileContent:
    """Describe the content of one file; reads its header and 64 bytes of each tensor, or all if it is to be verified.

    Two fine-tunes of one base model have equal headers and lengths, so these alone don't identify a file. Training changes
    every tensor nearly everywhere, and 64 bytes from the middle of each show that without reading the rest.
    """
    kept = f"contents-{_digest(msgspec.json.encode((file, verify)))}.json"
    if verify:  # takes minutes for large files
        with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
            return msgspec.json.decode(read_cached(kept) or b"", type=FileContent)
    with contextlib.closing(SafetensorsFile(file)) as opened:
        header = opened.read_pieces([(0, opened.header_bytes)])
        entries = sorted(opened.entries.values(), key=lambda entry: (entry.start, entry.stop))
        samples = opened.read_pieces(_middle(entry) for entry in entries)
        content = FileContent(
            name=Path(file.path).name,
            num_bytes=file.num_bytes,
            header_bytes=opened.header_bytes,
            header_digest=_digest(header),
            fingerprint=_digest(header + file.num_bytes.to_bytes(8, "little") + samples),
            tensor_digests=tuple(_digest_tensor(opened, entry) for entry in entries) if verify else (),
        )
    if verify:
        write_cached(kept, msgspec.json.encode(content).decode())
    return content


def model_name(path: Path) -> str:
    """Return what people call the model that a file belongs to: its folder's name, or its name on the hub."""
    folder = path.parent
    if folder.parent.name == "snapshots":  # of Hugging Face's cache: models--OWNER--NAME/snapshots/COMMIT
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def digest_config(folder: Path) -> str:
    """Return the digest of a folder's config.json, by its values; empty if it can't be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    if isinstance(config, dict):
        config = {name: value for name, value in config.items() if name not in _WITHOUT_EFFECT}
    return _digest(json.dumps(config, sort_keys=True).encode())


def digest_header(header: bytes | bytearray | memoryview) -> str:
    """Return the digest of a header, its length included."""
    return _digest(header)


def digest_tensor(data: bytes | memoryview) -> str:
    """Return the digest of a tensor's bytes that `FileContent` states."""
    return hashlib.sha256(data).hexdigest()


def _digest_tensor(opened: SafetensorsFile, entry: TensorEntry) -> str:
    digest = hashlib.sha256()  # processors have instructions for it: twice as fast as BLAKE2b
    for start in range(entry.start, entry.stop, _READ_BYTES):
        digest.update(opened.read_pieces([(start, min(entry.stop, start + _READ_BYTES))]))
    return digest.hexdigest()


def _middle(entry: TensorEntry) -> tuple[int, int]:
    """Return the 64 bytes in the middle of a tensor, or all of a small one."""
    first = max(entry.start, (entry.start + entry.stop - _SAMPLE_BYTES) // 2)
    return first, min(entry.stop, first + _SAMPLE_BYTES)


def _digest(data: bytes | bytearray | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()

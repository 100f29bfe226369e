"""Finds the files of a checkpoint, and the dtype that its weights are loaded in.

Reads names, indices and headers; reads no weights and knows no model.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lingualinked.errors import ArgumentError, CheckpointError
from lingualinked.model.hf_internals import loading
from lingualinked.model.weights.safetensors_file import SafetensorsFile, identify_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig

    from lingualinked.model.spec import CheckpointFile

_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_FETCHED = (".json", ".model", ".safetensors")
_OTHER_FORMATS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


def check_no_adapter(path: str, **hub: Any) -> None:
    """Raise CheckpointError if what is asked for on the hub is an adapter to another checkpoint."""
    if not Path(path).is_dir() and _find(path, _ADAPTER, hub) is not None:
        raise CheckpointError(
            f"{path} is an adapter (PEFT, {_ADAPTER}): load the base model and call load_adapter({path!r}), or download "
            "the adapter and pass its folder"
        )


def check_fetched(folder: Path) -> None:
    """Raise CheckpointError if a checkpoint's folder, if it exists, contains git-lfs pointers instead of files."""
    files = sorted(path for path in folder.glob("*") if path.suffix in _FETCHED and path.is_file())
    pointers = [path.name for path in files if _is_pointer(path)]
    if pointers:
        raise CheckpointError(
            f"{folder} has git-lfs pointers in place of {', '.join(pointers)}: run 'git lfs pull' there, or download the "
            "checkpoint again"
        )


def _is_pointer(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:  # if it can't be read, reading it later raises
        return file.read(len(_POINTER)) == _POINTER
    return False


def resolve_files(path: str | os.PathLike[str], **hub: Any) -> tuple[CheckpointFile, ...]:
    """Find the safetensors files of a folder or a hub id: one file, or those that an index names.

    They are recorded as they are now: a file that replaces one of them later is not read.
    """
    path = os.fspath(path)
    check_no_adapter(path, **hub)
    single = _find(path, _WEIGHTS, hub)
    if single is not None:
        return (identify_file(single),)
    index = _find(path, _INDEX, hub)
    if index is not None:
        return tuple(_shard(path, name, index, hub) for name in _shard_names(index))
    for name in _OTHER_FORMATS:
        if _find(path, name, hub) is not None:
            raise CheckpointError(
                f"{path} has its weights in {name}, and only safetensors are read: convert them with "
                "AutoModelForCausalLM.from_pretrained(path).save_pretrained(folder)"
            )
    if Path(path).is_dir() or not _may_be_hub_id(path):
        raise CheckpointError(
            f"no checkpoint at {path!r}: there is neither {_WEIGHTS} nor {_INDEX}; pass the folder that save_pretrained wrote"
        )
    raise CheckpointError(
        f"{path!r} is neither a local folder nor a model with safetensors weights on the Hugging Face hub or in its "
        "local cache: check the name, the revision and the connection"
    )


def _may_be_hub_id(path: str) -> bool:
    return not Path(path).is_absolute() and path.count("/") <= 1 and not path.startswith(".")


def _find(path: str, name: str, hub: dict[str, Any]) -> str | None:
    if not Path(path).is_dir() and not _may_be_hub_id(path):
        return None
    try:
        return loading.find_file(path, name, **hub)
    except OSError as error:
        raise CheckpointError(f"{name} of {path!r} can't be downloaded from the Hugging Face hub: {error}") from error


def _shard_names(index: str) -> list[str]:
    """Return the names of the files in an index, which must lie in its own folder."""
    try:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors files ({error!r}): copy or download it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r} outside its own folder: it can't be trusted")
    return names


def _shard(path: str, name: str, index: str, hub: dict[str, Any]) -> CheckpointFile:
    found = _find(path, name, hub)
    if found is None:
        raise CheckpointError(
            f"{name}, a shard that {index} names, is missing: copy or download the whole checkpoint again"
        )
    return identify_file(found)


def resolve_dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig, files: Sequence[CheckpointFile]) -> str:
    """Resolve the name of the weights' dtype as transformers does; ``files`` are empty for dummy weights."""
    if dtype is None or dtype == "auto":
        dtype = config.dtype or _dtype_of_files(files) or torch.get_default_dtype()
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ArgumentError(
            f"dtype={dtype!r} is not a floating-point dtype of torch: use 'auto', 'float32', 'bfloat16' or 'float16'"
        )
    return str(resolved).removeprefix("torch.")


def _dtype_of_files(files: Sequence[CheckpointFile]) -> torch.dtype | None:
    """Return the dtype of the first floating-point tensor in the first file."""
    entries = SafetensorsFile(files[0]).entries.values() if files else ()
    return next((entry.dtype for entry in entries if entry.dtype.is_floating_point), None)

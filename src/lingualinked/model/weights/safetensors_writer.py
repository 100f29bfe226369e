"""Writes a safetensors file tensor by tensor, so that no more than one is in memory.

Knows the file format; no models, and not which file of a checkpoint holds which tensors.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingualinked.model.weights.safetensors_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the tensors' bytes in the file


def write_file(path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write tensors of these shapes and dtypes in this order, each read when its turn has come; a failure leaves the old file.

    Those of wider dtypes should come first, so that all are aligned.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(_header(like))
            for name in like:
                tensor = read(name).contiguous()
                assert (tensor.shape, tensor.dtype) == (like[name].shape, like[name].dtype), name
                values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
                file.write(memoryview(values))
                del tensor, values
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _header(like: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in like:
        stop = start + like[name].nbytes
        entries[name] = {
            "dtype": _NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

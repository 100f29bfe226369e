"""Refuses a checkpoint whose weights and KV exceed the memory of all devices together, before any process starts.

Knows config.json and the headers of safetensors files; imports neither torch nor transformers. Underestimates rather than overestimates.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from lingualinked.device import Device
from lingualinked.errors import InfeasiblePlanError
from lingualinked.quantities import bytes_text, count_text
from lingualinked.workload import Workload

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_LAYER = re.compile(r"\.(\d+)\.|^(\d+)\.")
_MAX_HEADER_BYTES = 100_000_000
_RECURRENT = ("mamba", "ssm", "attn_layer", "linear_attn", "block_type", "conv_kernel")  # of names in a config


def check_total_memory(
    folder: Path, dtype: str | None, devices: Sequence[Device], workload: Workload | None, reserve: float
) -> None:
    """Raise InfeasiblePlanError if a local checkpoint exceeds the memory of all devices together.

    ``reserve`` is the fraction of every device's memory that stays free. Unreadable files pass: the loader reports them.
    """
    try:
        # It raises OSError where no file can be opened, which is reported later.
        offered = (1 - reserve) * _total_memory(devices)
        if math.isinf(offered):
            return
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        num_layers = int(config["num_hidden_layers"])
        item_bytes = _ITEM_BYTES.get(dtype or config.get("dtype") or config.get("torch_dtype") or "")
        weights = sum(_needed_bytes(_headers(folder), num_layers, item_bytes))
        kv = 0 if workload is None else _kv_bytes(config, num_layers, item_bytes or 2, workload)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    missing = math.ceil(weights + kv - offered)
    if missing <= 0:
        return
    tokens = (
        "" if workload is None else f" and the KV of {workload.num_rows:,} x {count_text(workload.num_tokens, 'token')}"
    )
    left = f", of which {reserve:.0%} stay free" if reserve else ""
    raise InfeasiblePlanError(
        f"the weights of {folder}{tokens} need at least {bytes_text(weights + kv)}, but "
        f"{', '.join(repr(device.name) for device in devices)} have {bytes_text(_total_memory(devices))} of memory{left}: "
        f"{bytes_text(missing, round_up=True)} are missing; add a device of that size, or raise memory",
        missing_bytes=missing,
    )


def _total_memory(devices: Sequence[Device]) -> float:
    """Sum the memory limits of devices; CPU devices without one share this machine's memory, and of other hosts' none is known."""
    limits = [device.memory_bytes for device in devices if device.memory_bytes is not None]
    unlimited = [device for device in devices if device.memory_bytes is None]
    if any(device.accelerator != "cpu" or device.address is not None for device in unlimited):
        return math.inf
    return sum(limits) + (psutil.virtual_memory().total if unlimited else 0)


def _headers(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the header of every file that the loader would read."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    names = [single.name] if single.exists() else sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        with (folder / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(name)
            yield json.loads(file.read(length))


def _needed_bytes(headers: Iterator[dict[str, Any]], num_layers: int, item_bytes: int | None) -> Iterator[int]:
    """Yield the bytes of every layer's matrices, and of the largest matrix outside: embedding and head may be tied."""
    largest_outside = 0
    for header in headers:
        for name, tensor in header.items():
            if name == "__metadata__" or tensor["dtype"] not in _ITEM_BYTES:
                continue
            if len(tensor["shape"]) < 2 or name.endswith("bias"):  # such as GPT-2's masks, which are not loaded
                continue
            num_bytes = math.prod(tensor["shape"]) * (item_bytes or _ITEM_BYTES[tensor["dtype"]])
            layer = _LAYER.search(name)
            if layer is None:
                largest_outside = max(largest_outside, num_bytes)
            elif int(layer[1] or layer[2]) < num_layers:
                yield num_bytes
    yield largest_outside


def _kv_bytes(config: dict[str, Any], num_layers: int, item_bytes: int, workload: Workload) -> int:
    """Return the KV bytes at the end of a workload's answers; 0 if the config does not give the number of KV heads.

    Recurrent states are not counted, nor layers that may keep one in place of KV.
    """
    if "num_key_value_heads" not in config:
        return 0
    kinds = config.get("layer_types")
    if kinds is not None:
        num_layers = sum(kind in ("full_attention", "sliding_attention") for kind in kinds)
    elif any(word in name for name in config for word in _RECURRENT):
        return 0
    num_layers = max(0, num_layers - (config.get("num_kv_shared_layers") or 0))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tokens = min(workload.num_tokens, config.get("sliding_window") or workload.num_tokens)
    return int(2 * num_layers * config["num_key_value_heads"] * head_dim * item_bytes * tokens * workload.num_rows)

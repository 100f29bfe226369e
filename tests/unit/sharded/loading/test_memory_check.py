"""What all devices together can't hold is refused from config.json and headers alone; nothing that might fit is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import lingualinked as ll
from lingualinked.sharded.loading.memory_check import check_total_memory
from profiles import MIB

CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
# Two layers of 1 Mi bfloat16 values in two matrices each, and an embedding of half a Mi: 2 x 2 MiB and 1 MiB.
TENSORS = {
    "model.embed_tokens.weight": [512, 1024],
    **{f"model.layers.{index}.{name}.weight": [512, 1024] for index in (0, 1) for name in ("mlp.up", "mlp.down")},
}
NEEDED = 5 * MIB


def write(folder: Path, tensors: dict[str, list[int]], dtype: str = "BF16", **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    entries, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def devices(*memory: int | None) -> list[ll.Device]:
    return [ll.Device(name=f"d{index}", memory=each) for index, each in enumerate(memory)]


def test_what_is_too_large_is_refused_with_the_bytes_that_are_missing(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    check_total_memory(tmp_path, None, devices(2 * MIB, 3 * MIB), None, 0.0)
    with pytest.raises(ll.InfeasiblePlanError, match=r"need at least 5.0 MiB, but 'd0', 'd1' have 4.0 MiB") as caught:
        check_total_memory(tmp_path, None, devices(2 * MIB, 2 * MIB), None, 0.0)
    assert caught.value.missing_bytes == NEEDED - 4 * MIB
    assert "1.00 MiB are missing; add a device of that size, or raise memory" in str(caught.value)


def test_what_stays_free_counts(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    with pytest.raises(ll.InfeasiblePlanError, match="of which 5% stay free") as caught:
        check_total_memory(tmp_path, None, devices(NEEDED), None, 0.05)
    assert caught.value.missing_bytes == pytest.approx(0.05 * NEEDED, abs=1)


@pytest.mark.parametrize(
    ("dtype", "config", "factor"),
    [
        ("float32", {}, 2),
        (None, {"dtype": "float32"}, 2),
        (None, {"torch_dtype": "float32"}, 2),
        ("bfloat16", {"dtype": "float32"}, 1),
        (None, {}, 1),
    ],
)
def test_the_dtype_that_is_loaded_counts(
    tmp_path: Path, dtype: str | None, config: dict[str, str], factor: int
) -> None:
    write(tmp_path, TENSORS, **config)
    check_total_memory(tmp_path, dtype, devices(factor * NEEDED), None, 0.0)
    with pytest.raises(ll.InfeasiblePlanError) as caught:
        check_total_memory(tmp_path, dtype, devices(factor * NEEDED - 7), None, 0.0)
    assert caught.value.missing_bytes == 7


def test_the_kv_of_a_workload_counts(tmp_path: Path) -> None:
    """2 layers, keys and values of 2 heads of 16 in bfloat16: 256 bytes per token, of 3 x 4 rows of 1,000 tokens."""
    write(tmp_path, TENSORS)
    workload = ll.Workload(prompt_tokens=900, new_tokens=100, batch_size=3, num_sessions=4)
    with pytest.raises(ll.InfeasiblePlanError, match="KV of 12 x 1,000 tokens") as caught:
        check_total_memory(tmp_path, None, devices(NEEDED), workload, 0.0)
    assert caught.value.missing_bytes == 2 * 2 * 2 * 16 * 2 * 12 * 1000
    write(tmp_path, TENSORS, sliding_window=10)
    with pytest.raises(ll.InfeasiblePlanError) as caught:
        check_total_memory(tmp_path, None, devices(NEEDED), workload, 0.0)
    assert caught.value.missing_bytes == 2 * 2 * 2 * 16 * 2 * 12 * 10


def test_what_a_model_may_not_read_does_not_count(tmp_path: Path) -> None:
    """A head that may be tied, masks, layers beyond the last, integers and vectors."""
    extra = {
        "lm_head.weight": [512, 1024],
        "h.0.attn.bias": [1, 1, 4096, 4096],
        "model.layers.2.mlp.up.weight": [4096, 4096],
        "model.layers.0.norm.weight": [1 << 20],
    }
    check_total_memory(write(tmp_path, TENSORS | extra), None, devices(NEEDED), None, 0.0)
    check_total_memory(write(tmp_path, TENSORS, dtype="I64"), None, devices(1), None, 0.0)


def test_where_memory_is_not_known_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TENSORS)
    gpu = ll.Device(name="gpu", accelerator="cuda:0")
    check_total_memory(tmp_path, None, [*devices(1), gpu], None, 0.0)
    check_total_memory(tmp_path, None, devices(1, None), None, 0.0)  # this machine has more than 5 MiB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1))
    away = ll.Device(name="away", address="tcp://10.0.0.5:5600")
    check_total_memory(tmp_path, None, [*devices(1), away], None, 0.0)  # however little this machine has


def test_what_can_not_be_read_is_left_to_the_loader(tmp_path: Path) -> None:
    small = devices(1)
    check_total_memory(tmp_path / "none", None, small, None, 0.0)
    write(tmp_path, TENSORS)
    for name, content in (
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", json.dumps(CONFIG).encode()),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", (4).to_bytes(8, "little") + b"[[]]"),
        ("model.safetensors", b""),
    ):
        (tmp_path / name).write_bytes(content)
        if content == json.dumps(CONFIG).encode():
            with pytest.raises(ll.InfeasiblePlanError):
                check_total_memory(tmp_path, None, small, None, 0.0)
        else:
            check_total_memory(tmp_path, None, small, None, 0.0)


def test_every_file_that_an_index_names_counts(tmp_path: Path) -> None:
    names = list(TENSORS)
    for number, part in enumerate((names[:2], names[2:])):
        write(tmp_path, {name: TENSORS[name] for name in part})
        (tmp_path / "model.safetensors").rename(tmp_path / f"part{number}.safetensors")
    index = {"weight_map": {name: f"part{int(names.index(name) >= 2)}.safetensors" for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_total_memory(tmp_path, None, devices(NEEDED), None, 0.0)
    with pytest.raises(ll.InfeasiblePlanError) as caught:
        check_total_memory(tmp_path, None, devices(NEEDED - 1), None, 0.0)
    assert caught.value.missing_bytes == 1


@pytest.mark.parametrize(
    ("config", "num_counted"),
    [
        ({}, 2),
        ({"layer_types": ["linear_attention", "full_attention"]}, 1),
        ({"layer_types": ["full_attention", "full_attention"], "num_kv_shared_layers": 1}, 1),
        ({"mamba_d_state": 16}, 0),
    ],
)
def test_only_layers_that_surely_keep_kv_are_counted(config: dict[str, Any], num_counted: int, tmp_path: Path) -> None:
    write(tmp_path, TENSORS, **config)
    workload = ll.Workload(prompt_tokens=1000, new_tokens=24)
    needed = NEEDED + num_counted * 2 * 2 * 16 * 2 * 1024  # keys and values x heads x dim x bfloat16 x tokens
    check_total_memory(tmp_path, None, devices(needed), workload, 0.0)
    with pytest.raises(ll.InfeasiblePlanError):
        check_total_memory(tmp_path, None, devices(needed - 1), workload, 0.0)

"""accelerate with disk offload: half of the layers lie in memory, and the others are read from disk at every step.

Knows transformers' device_map; the weights are the sharded model's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lingualinked.errors import ArgumentError


def load_offloaded(path: str, uncut: Any, folder: str) -> Any:
    """Load a model whose second half of layers stays on disk; a model of random weights is written there first."""
    try:
        import accelerate  # noqa: F401 - transformers needs it for device_map
    except ImportError as error:
        raise ArgumentError("--against accelerate needs accelerate: pip install accelerate, or leave it out") from error
    from transformers import AutoModelForCausalLM

    if not any(Path(path).glob("*.safetensors")):
        uncut.save_pretrained(folder)
        path = folder
    layers = next(name for name, module in uncut.named_modules() if name.endswith(("layers", ".h")) and len(module))
    number = uncut.config.get_text_config().num_hidden_layers
    device_map: dict[str, str] = {
        f"{layers}.{index}": "cpu" if index < number // 2 else "disk" for index in range(number)
    }
    for name, module in uncut.named_modules():  # all that is beside the layers stays in memory
        is_beside = name and not layers.startswith(name) and not name.startswith(layers)
        if is_beside and not any(name.startswith(f"{known}.") for known in device_map):
            device_map[name] = "cpu"
        del module
    return AutoModelForCausalLM.from_pretrained(
        path, device_map=device_map, offload_folder=tempfile.mkdtemp(dir=folder), dtype=uncut.dtype
    )

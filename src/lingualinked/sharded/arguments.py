"""Refuses by name the arguments of transformers' ``from_pretrained`` that a sharded model does not support.

Knows names and remedies only. The remaining arguments are config attributes, or unknown.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lingualinked.errors import ArgumentError, UnsupportedOperationError

_REMEDIES = {
    "adapter_kwargs": "merge the adapter into the weights first",
    "adapter_name": "merge the adapter into the weights first",
    "allow_all_kernels": "stages run the model's own forward; leave it out",
    "code_revision": "custom code is not cut; leave it out",
    "device_map": "use devices= or plan=",
    "device_mesh": "use devices= or plan=",
    "disable_mmap": "workers read files and never map them; leave it out",
    "distributed_config": "use devices= or plan=",
    "experts_implementation": "stages run transformers' default; leave it out",
    "fusion_config": "stages run the model's own forward; leave it out",
    "gguf_file": "convert it to safetensors first",
    "ignore_mismatched_sizes": "every tensor must have its shape; leave it out",
    "kernel_config": "stages run the model's own forward; leave it out",
    "key_mapping": "rename the tensors in the checkpoint",
    "max_memory": "use Device(memory=...)",
    "offload_buffers": "add a device instead",
    "offload_folder": "add a device instead",
    "output_loading_info": "a tensor that is missing or does not fit is an error here; leave it out",
    "quantization_config": "quantisation is not supported yet; load the weights as they are",
    "state_dict": "save it with save_pretrained and load the folder",
    "tp_plan": "use devices= or plan=",
    "tp_size": "use devices= or plan=",
    "tqdm_class": "use progress=",
    "use_kernels": "stages run the model's own forward; leave it out",
    "use_safetensors": "safetensors is the only supported format; leave it out",
    "variant": "give a folder that holds only the files of the variant",
}
# Values that change nothing here. For all other arguments these are None and False.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "adapter_kwargs": (None, {}),
    "adapter_name": (None, "default"),
    "disable_mmap": (None, True),
    "use_safetensors": (None, True),
}
# transformers accepts these, but they have no effect on safetensors checkpoints.
_WITHOUT_EFFECT = (
    "_commit_hash",
    "_fast_init",
    "_from_auto",
    "_from_pipeline",
    "from_flax",
    "from_tf",
    "low_cpu_mem_usage",
    "mirror",
    "offload_state_dict",
    "weights_only",
)


def check_interpreter() -> None:
    """Check that Python keeps docstrings, which transformers needs when it imports a model."""
    if sys.flags.optimize > 1:
        raise UnsupportedOperationError(
            "python -OO (or PYTHONOPTIMIZE=2) strips docstrings, and transformers can't import models without them: "
            "run python, or python -O"
        )


def select_config_attributes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse arguments of ``from_pretrained`` that have no sharded counterpart; return the possible config attributes."""
    for name in _REMEDIES.keys() & arguments.keys():
        value = arguments[name]
        if not any(type(value) is type(each) and value == each for each in _HARMLESS.get(name, (None, False))):
            raise UnsupportedOperationError(
                f"{name}={value!r} is not supported by ShardedModel.from_pretrained: {_REMEDIES[name]}"
            )
    return {name: value for name, value in arguments.items() if name not in _REMEDIES and name not in _WITHOUT_EFFECT}


def check_attn_implementation(value: object) -> str | None:
    """Check that an attention implementation is part of transformers, since workers run no other code; return it."""
    if isinstance(value, Mapping) or (isinstance(value, str) and ("/" in value or "|" in value)):
        raise UnsupportedOperationError(
            f"attn_implementation={value!r} is not supported by ShardedModel.from_pretrained: "
            "choose one that is part of transformers, such as 'sdpa' or 'eager'"
        )
    if value is not None and not isinstance(value, str):
        raise ArgumentError(f"attn_implementation={value!r} must be a name, such as 'sdpa' or 'eager'")
    return value

"""The arguments of ``from_pretrained``: checks them, and refuses by name those of transformers that are not supported.

Knows values, names and remedies; imports neither torch nor transformers. The remaining arguments are config attributes, or unknown.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lingualinked.checks import check_positive, is_integer
from lingualinked.control.policy import RebalancePolicy
from lingualinked.errors import ArgumentError, CheckpointError, UnsupportedOperationError
from lingualinked.planning.plan import Plan
from lingualinked.workload import Objective, Workload, check_objective

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from lingualinked.cluster.cluster import Cluster

_NOT_GIVEN = {
    "adapter",
    "adapter_kwargs",
    "adapter_name",
    "extra",
    "hub",
    "owns_cluster",
}  # what is worked out, or sorted elsewhere
_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_REMEDIES = {
    "adapter_kwargs": "the folder holds no adapter; call load_adapter of the loaded model",
    "adapter_name": "the folder holds no adapter; call load_adapter of the loaded model",
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadArguments:
    """The arguments of `ShardedModel.from_pretrained`."""

    path: str  # of the base model
    adapter: str | None = None  # the folder that was asked for, if it holds an adapter
    adapter_name: str = "default"
    adapter_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cluster: Cluster | None = None
    owns_cluster: bool = False
    plan: Plan | tuple[Plan, Plan] | Literal["even"] | None = None  # two: of an encoder and of a decoder
    objective: Objective = "throughput"
    workload: Workload | None = None
    max_kv_tokens: int | None = None
    batch_invariant: bool = False
    towers: bool = True
    rebalance: Literal["auto"] | RebalancePolicy | None = None
    seed: int = 0
    load_format: str = "auto"
    progress: bool = True
    timeout_s: float | None = None
    dtype: torch.dtype | str | None = "auto"
    config: PreTrainedConfig | str | os.PathLike[str] | None = None
    hub: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attn_implementation: str | None = None
    task: str | None = None
    trust_remote_code: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_interpreter()
        if self.load_format not in ("auto", "dummy"):
            raise ArgumentError(f"load_format={self.load_format!r} must be 'auto' or 'dummy'")
        is_pair = isinstance(self.plan, tuple) and [*map(type, self.plan)] == [Plan, Plan]
        if not is_pair and not isinstance(self.plan, Plan | None) and self.plan != "even":
            raise ArgumentError(f"plan={self.plan!r} must be a lingualinked.Plan, two of them, 'even' or None")
        check_objective(self.objective)
        if not isinstance(self.workload, Workload | None):
            raise ArgumentError(f"workload is a {type(self.workload).__name__}: pass a lingualinked.Workload")
        if self.max_kv_tokens is not None and not is_integer(self.max_kv_tokens, at_least=1):
            raise ArgumentError(f"max_kv_tokens={self.max_kv_tokens!r} must be a positive integer")
        if not isinstance(self.batch_invariant, bool):
            raise ArgumentError(f"batch_invariant={self.batch_invariant!r} must be True or False")
        if not isinstance(self.towers, bool):
            raise ArgumentError(f"towers={self.towers!r} must be True or False")
        if self.timeout_s is not None:
            check_positive(self.timeout_s, "timeout_s")
        if not isinstance(self.rebalance, RebalancePolicy | None) and self.rebalance != "auto":
            raise ArgumentError(f"rebalance={self.rebalance!r} must be 'auto', a lingualinked.RebalancePolicy or None")

    @classmethod
    def of(cls, path: str | os.PathLike[str], **arguments: Any) -> LoadArguments:
        """Check a path, and sort the other arguments into fields, arguments for the hub, and the rest."""
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            what = repr(path) if isinstance(path, str) else f"of type {type(path).__name__}"
            raise ArgumentError(
                f"the model to load is {what}: pass the folder of a checkpoint or a model id of the hub"
            )
        base, adapter = _find_base(os.fspath(path), arguments.get("subfolder", ""))
        of_adapter: dict[str, Any] = {}
        if adapter is not None:
            of_adapter = {name: arguments.pop(name, None) for name in ("adapter_name", "adapter_kwargs")}
            of_adapter = {"adapter": adapter} | {name: value for name, value in of_adapter.items() if value is not None}
        fields = {field.name for field in dataclasses.fields(cls)} - _NOT_GIVEN
        own = {name: value for name, value in arguments.items() if name in fields}
        hub = {name: value for name, value in arguments.items() if name in _HUB_ARGUMENTS}
        extra = {name: value for name, value in arguments.items() if name not in fields and name not in hub}
        return cls(path=base, hub=hub, extra=extra, **own, **of_adapter)


def _find_base(path: str, subfolder: str) -> tuple[str, str | None]:
    """Return where the base model is, and the folder if it holds an adapter of peft; its own config, if any, counts more."""
    file = Path(path) / subfolder / "adapter_config.json"
    if not file.is_file():
        return path, None
    if (Path(path) / "config.json").is_file():
        return path, path
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not the configuration of an adapter ({error!r}): copy it again") from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file} names no base model: load the base model, and call load_adapter({path!r}) then")
    return base, path


def _check_interpreter() -> None:
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

"""From the arguments of ``from_pretrained`` to a model in service.

Knows checkpoints, configs and plans; workers are told by the cluster.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.pipeline import Pipeline
from lingualinked.errors import ArgumentError, CheckpointError, UnsupportedOperationError
from lingualinked.model.architectures import check_architecture
from lingualinked.model.checkpoint import resolve_dtype, resolve_files
from lingualinked.model.loading import check_weights
from lingualinked.model.parts import ModelParts, build_meta, find_parts
from lingualinked.model.spec import ModelSpec
from lingualinked.planning.even import WeightBytes, even_plan, inexact_because
from lingualinked.planning.plan import Plan, check_plan
from lingualinked.sharded.face import ShardedCausalLM, wear_face
from lingualinked.sharded.progress import LoadProgress

# What transformers' from_pretrained takes and what to do instead here.
_REMEDIES = {
    "adapter_kwargs": "merge the adapter into the weights first",
    "adapter_name": "merge the adapter into the weights first",
    "allow_all_kernels": "stages run the model's own forward; leave it out",
    "code_revision": "custom code is not cut; leave it out",
    "device_map": "use devices= or plan=",
    "device_mesh": "use devices= or plan=",
    "disable_mmap": "workers never map files; leave it out",
    "distributed_config": "use devices= or plan=",
    "experts_implementation": "set it in the config",
    "fusion_config": "leave it out",
    "gguf_file": "convert it to safetensors first",
    "ignore_mismatched_sizes": "every tensor must have its shape; leave it out",
    "kernel_config": "stages run the model's own forward; leave it out",
    "key_mapping": "rename the tensors in the checkpoint",
    "max_memory": "use Device(memory=...)",
    "offload_buffers": "add a device instead",
    "offload_folder": "add a device instead",
    "output_loading_info": "a tensor that is missing or does not fit is an error here; leave it out",
    "quantization_config": "it is not supported yet; load the weights as they are",
    "state_dict": "save it with save_pretrained and give the folder",
    "tp_plan": "use devices= or plan=",
    "tp_size": "use devices= or plan=",
    "use_kernels": "stages run the model's own forward; leave it out",
    "use_safetensors": "safetensors is the only format; leave it out",
    "variant": "give a folder that holds only the wanted files",
    "weights_only": "safetensors holds nothing else; leave it out",
}
# transformers takes these without effect, and so do we.
_WITHOUT_EFFECT = ("_fast_init", "from_flax", "from_tf", "low_cpu_mem_usage", "mirror", "offload_state_dict")


_HUB_DEFAULTS: Mapping[str, Any] = {
    "cache_dir": None,
    "force_download": False,
    "local_files_only": False,
    "proxies": None,
    "revision": "main",
    "subfolder": "",
    "token": None,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadArguments:
    """The arguments of `ShardedModel.from_pretrained`, as far as they are checked without torch."""

    path: str
    cluster: Cluster
    owns_cluster: bool = False
    plan: Plan | None = None
    max_kv_tokens: int | None = None
    seed: int = 0
    load_format: str = "auto"
    progress: bool = True
    timeout_s: float | None = None
    dtype: torch.dtype | str | None = "auto"
    config: PreTrainedConfig | str | os.PathLike[str] | None = None
    hub: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model that is known in every detail but its weights.

    Parameters
    ----------
    spec : ModelSpec
        What workers are told.
    meta : PreTrainedModel
        The whole model on the meta device, with its generation config.
    parts : ModelParts
        Its layers and what lies around them.
    plan : Plan
        Where they go.
    """

    spec: ModelSpec
    meta: PreTrainedModel
    parts: ModelParts
    plan: Plan


def prepare(arguments: LoadArguments) -> Prepared:
    """Read config and headers, and plan: everything that comes before weights.

    Raises
    ------
    LingualinkedError
        As `ShardedModel.from_pretrained` says.
    """
    extra = dict(arguments.extra)
    hub = {**_HUB_DEFAULTS, **arguments.hub}
    hub |= {name: extra.pop(name) for name in ("force_download", "proxies") if name in extra}
    generation_config: GenerationConfig | None = extra.pop("generation_config", None)
    dtype = extra.pop("torch_dtype", None) or arguments.dtype
    _refuse_arguments(extra)
    for name in _WITHOUT_EFFECT:
        extra.pop(name, None)
    config = _config(arguments, hub, extra)
    class_name = check_architecture(config)
    dummy = arguments.load_format == "dummy"
    files = () if dummy else resolve_files(arguments.path, **hub)
    resolved = resolve_dtype(dtype, config, files)
    config.dtype = getattr(torch, resolved)
    config.name_or_path = arguments.path
    spec = ModelSpec(
        class_name=class_name,
        config_json=config.to_json_string(use_diff=False),
        dtype=resolved,
        attn_implementation=arguments.attn_implementation,
        load_format="dummy" if dummy else "safetensors",
        files=files,
        seed=arguments.seed,
    )
    meta = build_meta(spec)
    parts = find_parts(meta)
    check_weights(spec, meta)
    # transformers' own reading of generation_config.json, with its fallback on the model's config.
    meta.adjust_generation_fn(generation_config, False, None, arguments.path, trust_remote_code=None, **hub)
    return Prepared(spec=spec, meta=meta, parts=parts, plan=_plan(arguments.plan, _weight_bytes(parts), arguments.cluster))


def load(arguments: LoadArguments) -> ShardedCausalLM:
    """Load a checkpoint into the workers of a cluster.

    Raises
    ------
    LingualinkedError
        As `ShardedModel.from_pretrained` says.
    """
    prepared = prepare(arguments)
    timeout_s = arguments.cluster.timeout_s if arguments.timeout_s is None else arguments.timeout_s
    pipeline = Pipeline(
        arguments.cluster, prepared.spec, prepared.plan, max_kv_tokens=arguments.max_kv_tokens, timeout_s=timeout_s
    )
    try:
        with LoadProgress(prepared.plan, shown=arguments.progress) as bars:
            pipeline.load(bars.update)
    except BaseException:
        pipeline.unload()
        raise
    return wear_face(prepared.meta, pipeline, prepared.parts, owns_cluster=arguments.owns_cluster)


def _refuse_arguments(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if name in _REMEDIES and value is not None and value is not False:
            raise UnsupportedOperationError(
                f"{name}={value!r} is not supported by ShardedModel.from_pretrained: {_REMEDIES[name]}"
            )


def _config(arguments: LoadArguments, hub: Mapping[str, Any], extra: Mapping[str, Any]) -> PreTrainedConfig:
    attributes = {name: value for name, value in extra.items() if name not in _REMEDIES}
    if isinstance(arguments.config, PreTrainedConfig):
        config, unused = copy.deepcopy(arguments.config), attributes
    else:
        source = arguments.path if arguments.config is None else os.fspath(arguments.config)
        if os.path.isabs(source) and not os.path.exists(source):
            raise CheckpointError(f"there is no checkpoint at {source!r}: give a folder with config.json, or a hub id")
        try:
            config, unused = AutoConfig.from_pretrained(
                source,
                return_unused_kwargs=True,
                trust_remote_code=arguments.trust_remote_code,
                **hub,
                **attributes,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no usable config.json for {source!r}: {error}") from error
    unused = {name: value for name, value in unused.items() if name not in ("trust_remote_code", *hub)}
    if unused:
        raise ArgumentError(f"unknown argument {next(iter(unused))!r} of ShardedModel.from_pretrained")
    return config


def _plan(given: Plan | None, weights: WeightBytes, cluster: Cluster) -> Plan:
    """Return the plan to place: the even one, or the given one with what is known of the weights."""
    if given is None:
        return even_plan(weights, cluster.devices)
    check_plan(given, len(weights.layers), [device.name for device in cluster.devices])
    stages = tuple(
        dataclasses.replace(stage, weight_bytes=weights.of_span(stage.start, stage.end)) for stage in given.stages
    )
    return Plan(stages=stages, inexact_because=inexact_because([cluster.device(name) for name in given.devices]))


def _weight_bytes(parts: ModelParts) -> WeightBytes:
    return WeightBytes(
        layers=parts.layer_bytes, prologue=parts.prologue_bytes, epilogue=parts.epilogue_bytes, tied=parts.tied_bytes
    )

"""From the arguments of ``from_pretrained`` to a model in service.

Knows checkpoints, configs and plans; workers are told by the cluster.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.pipeline import Pipeline
from lingualinked.control.policy import RebalancePolicy
from lingualinked.errors import ArgumentError, CheckpointError, InfeasiblePlanError, UncuttableModelError
from lingualinked.model.architectures import check_architecture
from lingualinked.model.checkpoint import check_fetched, check_no_adapter, resolve_dtype, resolve_files
from lingualinked.model.footprint import Footprint, measure_footprint
from lingualinked.model.loading import check_weights
from lingualinked.model.parts import ModelParts, build_meta, find_parts
from lingualinked.model.spec import ModelSpec
from lingualinked.planning.even import WeightBytes, even_plan
from lingualinked.planning.plan import Plan, check_plan, check_trust, inexact_because
from lingualinked.profile import ModelProfile, Profile
from lingualinked.sharded.arguments import check_attn_implementation, check_interpreter, take_config_attributes
from lingualinked.sharded.face import ShardedCausalLM, wear_face
from lingualinked.sharded.model_code import ModelCode
from lingualinked.sharded.profiling import find_plan
from lingualinked.sharded.progress import DeviceProgress
from lingualinked.sharded.rebalancing import decide_from_profile
from lingualinked.workload import Objective, Workload

if TYPE_CHECKING:
    from lingualinked.device import Device, Links
    from lingualinked.planning.estimate import Figures, LayerOperations

_HUB_DEFAULTS: Mapping[str, Any] = {
    "cache_dir": None,
    "force_download": False,
    "local_files_only": False,
    "proxies": None,
    "revision": "main",
    "subfolder": "",
    "token": None,
}
_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
# Attributes of a config that stages take no notice of.
_ABOUT_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadArguments:
    """The arguments of `ShardedModel.from_pretrained`, as far as they are checked without torch."""

    path: str
    cluster: Cluster | None = None
    owns_cluster: bool = False
    plan: Plan | Literal["even"] | None = None
    objective: Objective = "throughput"
    workload: Workload | None = None
    max_kv_tokens: int | None = None
    policy: RebalancePolicy | None = None
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

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise ArgumentError(f"load_format={self.load_format!r} must be 'auto' or 'dummy'")

    @classmethod
    def of(cls, path: str, cluster: Cluster | None, **arguments: Any) -> LoadArguments:
        """Sort arguments: those that are fields, those for the hub, and the rest."""
        fields = {field.name for field in dataclasses.fields(cls)} - {"hub", "extra"}
        own = {name: value for name, value in arguments.items() if name in fields}
        hub = {name: value for name, value in arguments.items() if name in _HUB_ARGUMENTS}
        extra = {name: value for name, value in arguments.items() if name not in fields and name not in hub}
        return cls(path=path, cluster=cluster, hub=hub, extra=extra, **own)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A model that is known in every detail but its weights.

    Parameters
    ----------
    spec : ModelSpec
        What workers are told.
    meta : PreTrainedModel
        The whole model on the meta device, with its generation config.
    parts : ModelParts
        Its layers and what lies around them.
    """

    spec: ModelSpec
    meta: PreTrainedModel
    parts: ModelParts

    def footprint(self) -> Footprint:
        """Run the model without data to see what it takes."""
        return measure_footprint(self.meta, self.parts, self.spec)

    def estimate(
        self, devices: Sequence[Device], figures: Mapping[str, Figures], links: Links | None, workload: Workload | None
    ) -> Profile:
        """Estimate a profile from what devices are said to do."""
        from lingualinked.planning.estimate import roofline_profile

        model = self.footprint().profile
        return roofline_profile(model, self.operations(model), devices, figures, links=links, workload=workload)

    def operations(self, model: ModelProfile) -> tuple[LayerOperations, ...]:
        """Count the operations of one layer of each of the model's kinds."""
        from lingualinked.model.operations import count_operations

        return count_operations(self.spec, self.parts, model.kind_of_layer)


def describe_spec(spec: ModelSpec) -> Described:
    """Describe a model by its specification."""
    meta = _build_meta(spec)
    return Described(spec=spec, meta=meta, parts=find_parts(meta))


def describe(arguments: LoadArguments) -> Described:
    """Read config and headers: everything that comes before plans and weights.

    Raises
    ------
    LingualinkedError
        As `ShardedModel.from_pretrained` says.
    """
    check_interpreter()
    extra = dict(arguments.extra)
    hub = {**_HUB_DEFAULTS, **arguments.hub}
    hub |= {name: extra.pop(name) for name in ("force_download", "proxies") if name in extra}
    if Path(arguments.path).is_dir():  # else the hub is asked, after the config
        check_fetched(Path(arguments.path) / hub["subfolder"])
        check_no_adapter(arguments.path, **hub)
    generation_config = extra.pop("generation_config", None)
    old_dtype = extra.pop("torch_dtype", None)
    dtype = arguments.dtype if arguments.dtype not in (None, "auto") else old_dtype
    config = _config(arguments, hub, take_config_attributes(extra))
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
        attn_implementation=_attn_implementation(arguments, config),
        load_format="dummy" if dummy else "safetensors",
        files=files,
        seed=arguments.seed,
    )
    described = describe_spec(spec)
    experts = getattr(config, "_experts_implementation", None)
    if experts != getattr(described.meta.config, "_experts_implementation", None):  # a loaded model's config says it
        take_config_attributes({"experts_implementation": experts})
    for name in _ABOUT_OUTPUTS:
        setattr(described.meta.config, name, getattr(config, name))
    check_weights(spec, described.meta)
    _set_generation_config(described.meta, generation_config, arguments, hub)
    return described


def load(arguments: LoadArguments) -> ShardedCausalLM:
    """Load a checkpoint into the workers of a cluster.

    Raises
    ------
    LingualinkedError
        As `ShardedModel.from_pretrained` says.
    """
    cluster = arguments.cluster
    assert cluster is not None
    described = describe(arguments)
    code = ModelCode(described.meta)
    plan = place(described, arguments)
    timeout_s = cluster.timeout_s if arguments.timeout_s is None else arguments.timeout_s
    pipeline = Pipeline(
        cluster,
        described.spec,
        plan,
        objective=arguments.objective,
        max_kv_tokens=arguments.max_kv_tokens,
        timeout_s=timeout_s,
    )
    try:
        with DeviceProgress.of_loading(plan, shown=arguments.progress) as bars:
            pipeline.load(bars.update)
        if arguments.policy is not None:
            decide_from_profile(pipeline, described, arguments.workload, arguments.policy, is_automatic=True)
    except BaseException:
        pipeline.unload()
        raise
    return wear_face(described.meta, pipeline, described.parts, code, owns_cluster=arguments.owns_cluster)


def _config(arguments: LoadArguments, hub: Mapping[str, Any], attributes: dict[str, Any]) -> PreTrainedConfig:
    """Read the config, or copy the one given, and set the attributes that it has."""
    if isinstance(arguments.config, PreTrainedConfig):
        config, unused = copy.deepcopy(arguments.config), attributes
    else:
        source = arguments.path if arguments.config is None else os.fspath(arguments.config)
        if Path(source).is_absolute() and not Path(source).exists():
            raise CheckpointError(f"there is no checkpoint at {source!r}: give a folder with config.json, or a hub id")
        try:
            config, unused = AutoConfig.from_pretrained(
                source,
                return_unused_kwargs=True,
                trust_remote_code=arguments.trust_remote_code,
                **hub,
                **attributes,
            )
        except (OSError, ValueError, StrictDataclassError) as error:
            raise CheckpointError(f"no usable config.json for {source!r}: {error}") from error
    unused = {name: value for name, value in unused.items() if name not in ("trust_remote_code", *hub)}
    if unused:
        raise ArgumentError(f"unknown argument {next(iter(unused))!r} of ShardedModel.from_pretrained")
    if arguments.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise UncuttableModelError(
            type(config).__name__,
            "trust_remote_code=True asks for the checkpoint's own code, and custom code is not cut: leave it out",
        )
    return config


def _attn_implementation(arguments: LoadArguments, config: PreTrainedConfig) -> str | None:
    """Settle what is asked for, here or in the config, whose JSON does not tell it."""
    asked = arguments.attn_implementation
    return check_attn_implementation(getattr(config, "_attn_implementation", None) if asked is None else asked)


def _build_meta(spec: ModelSpec) -> PreTrainedModel:
    try:
        return build_meta(spec)
    except ArgumentError:  # which says it already
        raise
    except (ImportError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError) as error:
        cause = f"{type(error).__name__}: {error}"
        if spec.attn_implementation is not None:
            raise ArgumentError(
                f"attn_implementation={spec.attn_implementation!r} can't be used here: {cause}"
            ) from error
        raise CheckpointError(f"{spec.class_name} can't be built from its config: {cause}") from error


def _set_generation_config(meta: Any, given: object, arguments: LoadArguments, hub: Mapping[str, Any]) -> None:
    """Take generation_config.json as transformers does, with its fallback on the model's config, or the one given."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise ArgumentError(f"generation_config is a {type(given).__name__}: give a transformers.GenerationConfig")
    described = arguments.load_format == "dummy" and isinstance(arguments.config, PreTrainedConfig)
    if given is None and described and not Path(arguments.path).is_dir():
        return  # the config says all there is: a hub need not be asked
    try:
        meta.adjust_generation_fn(
            given, True, None, arguments.path, trust_remote_code=arguments.trust_remote_code, **hub
        )
    except OSError as error:
        if arguments.load_format != "dummy":  # for a dummy there need be no files
            raise CheckpointError(f"no usable generation config for {arguments.path!r}: {error}") from error


def place(described: Described, arguments: LoadArguments) -> Plan:
    """Give the plan to load by: the one given, the even one, or the solver's from what is measured.

    Raises
    ------
    InfeasiblePlanError
        If the layers don't fit, or the plan given is not one for this model and cluster.
    LingualinkedError
        If a worker can't measure.
    """
    cluster, given, weights = arguments.cluster, arguments.plan, described.parts.weights
    assert cluster is not None
    if given is None:
        footprint = described.footprint()
        workload = footprint.profile.fit_workload(arguments.workload)
        return find_plan(cluster, described.spec, footprint, workload, arguments.objective, progress=arguments.progress)
    if isinstance(given, str):
        return fit_plan(even_plan(weights, cluster.devices), weights, cluster, None, arguments.workload)
    profile = None if given.profile is None else described.footprint().profile
    return fit_plan(given, weights, cluster, profile, arguments.workload)


def fit_plan(
    plan: Plan, weights: WeightBytes, cluster: Cluster, model: ModelProfile | None, workload: Workload | None
) -> Plan:
    """Give a plan with what this model and cluster make of it.

    Parameters
    ----------
    plan : Plan
        Any.
    weights : WeightBytes
        Of the model.
    cluster : Cluster
        Where it is to be placed.
    model : ModelProfile or None
        Of the model, to compare a plan's profile with; ``None``: not known.
    workload : Workload or None
        What is planned for, unless the plan says so; layers that either keeps on trusted devices stay there.

    Raises
    ------
    InfeasiblePlanError
        If it is not a plan for them.
    """
    check_plan(plan, len(weights.layers), [device.name for device in cluster.devices])
    if plan.profile is not None and model is not None and plan.profile.model.fingerprint != model.fingerprint:
        raise InfeasiblePlanError(
            f"the plan was made from a profile of another model ({plan.profile.model.name}, "
            f"{plan.profile.model.dtype}): profile and solve for this one"
        )
    stages = tuple(
        dataclasses.replace(stage, weight_bytes=weights.of_span(stage.start, stage.end)) for stage in plan.stages
    )
    devices = [cluster.device(name) for name in plan.devices]
    if workload is not None:
        front, back = (max(pair) for pair in zip(plan.trusted_layers, workload.trusted_layers, strict=True))
        workload = dataclasses.replace(plan.workload or workload, trusted_layers=(front, back))
    plan = dataclasses.replace(
        plan, stages=stages, inexact_because=inexact_because(devices), workload=workload or plan.workload
    )
    check_trust(plan, cluster.devices)
    return plan

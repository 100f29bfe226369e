"""Describes a model by the arguments of ``from_pretrained``: config, parts and files, without loading weights.

Knows checkpoints and configs; neither messages to workers nor where layers are placed.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from lingualinked.device_specs import DeviceSpecs
from lingualinked.errors import ArgumentError, CheckpointError
from lingualinked.model.custom_code import import_class
from lingualinked.model.cutting.architectures import check_architecture
from lingualinked.model.cutting.footprint import Footprint, measure_footprint
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.model.cutting.operations import count_operations
from lingualinked.model.cutting.parts import build_meta, parts_of
from lingualinked.model.cutting.tasks import class_of_task
from lingualinked.model.proving.evidence import check_exact
from lingualinked.model.spec import CustomCode, ModelSpec
from lingualinked.model.weights.checkpoint import check_fetched, check_no_adapter, resolve_dtype, resolve_files
from lingualinked.model.weights.span_loading import check_weights
from lingualinked.planning.estimate import LayerOperations, roofline_profile
from lingualinked.profile import ModelProfile, Profile
from lingualinked.sharded.loading.arguments import LoadArguments, check_attn_implementation, select_config_attributes
from lingualinked.sharded.loading.own_code import find_custom_code

if TYPE_CHECKING:
    from lingualinked.device import Device, Links
    from lingualinked.workload import Workload

_HUB_DEFAULTS: Mapping[str, Any] = {
    "cache_dir": None,
    "force_download": False,
    "local_files_only": False,
    "proxies": None,
    "revision": "main",
    "subfolder": "",
    "token": None,
}
# Attributes of a config that the stages ignore.
_ABOUT_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A model without its weights: its specification for workers, the whole model on the meta device, and its parts."""

    spec: ModelSpec
    meta: PreTrainedModel
    parts: ModelParts

    def holding(self, parts: Collection[str]) -> Described:
        """Return the same model with every stage holding some parts, and no others that could be sent."""
        held = self.parts.holding(parts)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, parts=held), parts=held)

    def footprint(self) -> Footprint:
        """Measure weights, KV and intermediate results by a run without data."""
        return measure_footprint(self.meta, self.parts, self.spec)

    def encoder(self) -> Described:
        """Describe the encoder of an encoder-decoder model whose decoder this is, and check its weights."""
        described = describe_spec(dataclasses.replace(self.spec, stack="encoder", parts=None))
        check_weights(described.spec, described.meta)
        return described

    def estimate(
        self,
        devices: Sequence[Device],
        specs: Mapping[str, DeviceSpecs],
        links: Links | None,
        workload: Workload | None,
    ) -> Profile:
        """Estimate a profile from the stated rates of devices."""
        model = self.footprint().profile
        return roofline_profile(model, self.operations(model), devices, specs, links=links, workload=workload)

    def operations(self, model: ModelProfile) -> tuple[LayerOperations, ...]:
        """Count the operations of one layer of each kind."""
        return count_operations(self.spec, self.parts, model.kind_of_layer)


def describe_spec(spec: ModelSpec) -> Described:
    """Describe a model from its specification."""
    meta = build_meta(spec)
    parts = parts_of(spec, meta)
    return Described(spec=dataclasses.replace(spec, parts=parts), meta=meta, parts=parts)


def describe(arguments: LoadArguments) -> Described:
    """Read the config and the headers of a checkpoint; raises like `ShardedModel.from_pretrained`."""
    # 1) sort the arguments
    extra = dict(arguments.extra)
    hub = {**_HUB_DEFAULTS, **arguments.hub}
    hub |= {name: extra.pop(name) for name in ("force_download", "proxies") if name in extra}
    if Path(arguments.path).is_dir():  # else the hub is asked when the config is read
        check_fetched(Path(arguments.path) / hub["subfolder"])
        check_no_adapter(arguments.path, **hub)
    generation_config = extra.pop("generation_config", None)
    old_dtype = extra.pop("torch_dtype", None)
    dtype = arguments.dtype if arguments.dtype not in (None, "auto") else old_dtype
    # 2) read the config, and check that its architecture can be cut, before any weights are read
    code = find_custom_code(arguments, hub)
    config = _config(arguments, hub, select_config_attributes(extra), code)
    causal_lm = check_architecture(config, code)
    class_name = causal_lm if code is not None else class_of_task(config, arguments.task, causal_lm)
    asked = arguments.attn_implementation
    if asked is None:
        asked = getattr(config, "_attn_implementation", None)  # which the config's JSON lacks
    dummy = arguments.load_format == "dummy"
    spec = ModelSpec(
        class_name=class_name,
        config_json=config.to_json_string(use_diff=False),
        dtype=resolve_dtype(dtype, config, ()),
        attn_implementation=check_attn_implementation(asked),
        load_format="dummy" if dummy else "safetensors",
        files=(),
        seed=arguments.seed,
        towers=arguments.towers,
        batch_invariant=arguments.batch_invariant,
        code=code,
        stack="decoder" if config.is_encoder_decoder else "",
    )
    if not spec.stack:  # the types of those are all tested
        check_exact(config, dataclasses.replace(spec, class_name=causal_lm))
    # 3) find the files, and specify the model for the workers
    files = () if dummy else resolve_files(arguments.path, **hub)
    resolved = resolve_dtype(dtype, config, files)
    config.dtype = getattr(torch, resolved)
    config.name_or_path = arguments.path
    spec = dataclasses.replace(spec, config_json=config.to_json_string(use_diff=False), dtype=resolved, files=files)
    # 4) build it on the meta device, and check the weights against it
    described = describe_spec(spec)
    spec = described.spec
    experts = getattr(config, "_experts_implementation", None)
    if experts != getattr(described.meta.config, "_experts_implementation", None):  # a loaded model's config says it
        select_config_attributes({"experts_implementation": experts})
    for name in _ABOUT_OUTPUTS:
        setattr(described.meta.config, name, getattr(config, name))
    check_weights(spec, described.meta)
    if described.meta.can_generate():
        _set_generation_config(described.meta, generation_config, arguments, hub)
    elif generation_config is not None:
        raise ArgumentError(f"generation_config for {class_name}, which does not generate: leave it out")
    return described


def _config(
    arguments: LoadArguments, hub: Mapping[str, Any], attributes: dict[str, Any], code: CustomCode | None
) -> PreTrainedConfig:
    """Read the config, or copy the given one, and set its attributes."""
    if isinstance(arguments.config, PreTrainedConfig):
        config, unused = copy.deepcopy(arguments.config), attributes
    else:
        source = arguments.path if arguments.config is None else os.fspath(arguments.config)
        if Path(source).is_absolute() and not Path(source).exists():
            raise CheckpointError(f"there is no checkpoint at {source!r}: give a folder with config.json, or a hub id")
        try:
            own: Any = AutoConfig
            if code is not None and code.config:
                own = import_class(code, code.config)
            else:
                attributes["trust_remote_code"] = arguments.trust_remote_code
            config, unused = own.from_pretrained(source, return_unused_kwargs=True, **hub, **attributes)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise CheckpointError(f"no usable config.json for {source!r}: {error}") from error
    unused = {name: value for name, value in unused.items() if name not in ("trust_remote_code", *hub)}
    if unused:
        raise ArgumentError(f"unknown argument {next(iter(unused))!r} of ShardedModel.from_pretrained")
    return config


def _set_generation_config(meta: Any, given: object, arguments: LoadArguments, hub: Mapping[str, Any]) -> None:
    """Set the given generation config, or read it as transformers does, with the model's config as a fallback."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise ArgumentError(f"generation_config is a {type(given).__name__}: pass a transformers.GenerationConfig")
    described = arguments.load_format == "dummy" and isinstance(arguments.config, PreTrainedConfig)
    if given is None and described and not Path(arguments.path).is_dir():
        return  # everything is in the config, so the hub need not be asked
    try:
        meta.adjust_generation_fn(
            given, True, None, arguments.path, trust_remote_code=arguments.trust_remote_code, **hub
        )
    except OSError as error:
        if arguments.load_format != "dummy":  # a dummy needs no files
            raise CheckpointError(f"no usable generation config for {arguments.path!r}: {error}") from error

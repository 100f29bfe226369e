"""Reads an adapter as peft saves it: its configuration, and its tensors from safetensors, checked against the model.

Knows peft's files and names; neither workers nor what is active.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingualinked.errors import ArgumentError, CheckpointError, UnsupportedOperationError
from lingualinked.model.cutting.parts import build_meta
from lingualinked.model.hf_internals.loading import find_file
from lingualinked.model.weights.safetensors_file import SafetensorsFile, identify_file
from lingualinked.sharded.adapters.adapter_layers import AdapterLayers

if TYPE_CHECKING:
    from peft import LoraConfig

    from lingualinked.model.spec import ModelSpec

CONFIG_NAME, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_INITS = (True, False, "gaussian", "orthogonal", "eva")  # others change the weights of the base model
# What an adapter may ask for beside LoRA, the values that ask for nothing, and what it would take.
_WITHOUT: Mapping[str, str] = {
    "alora_invocation_tokens": "only LoRA, rsLoRA and DoRA are supported",
    "arrow_config": "only LoRA, rsLoRA and DoRA are supported",
    "kasa_config": "only LoRA, rsLoRA and DoRA are supported",
    "layer_replication": "the plan has the layers of the base model",
    "megatron_config": "only LoRA, rsLoRA and DoRA are supported",
    "modules_to_save": "whole modules are not replaced; save a base model that has them",
    "monteclora_config": "only LoRA, rsLoRA and DoRA are supported",
    "target_parameters": "only linear layers and embeddings are adapted",
    "trainable_token_indices": "only linear layers and embeddings are adapted",
    "use_bdlora": "only LoRA, rsLoRA and DoRA are supported",
    "use_qalora": "only LoRA, rsLoRA and DoRA are supported",
    "velora_config": "only LoRA, rsLoRA and DoRA are supported",
}


def find_config(folder: str, **hub: Any) -> str:
    """Return the path of an adapter's configuration; raise CheckpointError if there is none."""
    try:
        found = find_file(folder, CONFIG_NAME, **hub)
    except OSError as error:
        raise CheckpointError(f"{CONFIG_NAME} of {folder!r} can't be downloaded: {error}") from error
    if found is None:
        raise CheckpointError(f"no adapter at {folder!r}: there is no {CONFIG_NAME}; pass the folder that peft saved")
    return found


def read_config(file: str) -> LoraConfig:
    """Read the configuration of an adapter; raise CheckpointError for one that is malformed, and refuse what is not LoRA."""
    try:
        fields = json.loads(Path(file).read_text(encoding="utf-8"))
        kind = fields["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not the configuration of an adapter ({error!r}): copy it again") from error
    if kind != "LORA":
        raise UnsupportedOperationError(
            f"{file} has peft_type={kind!r}: of peft's adapters, a sharded model supports LORA"
        )
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(Path(file).parent))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a configuration of LoRA: {error}") from error
    assert isinstance(config, LoraConfig)
    return config


def check_config(config: object, what: str) -> LoraConfig:
    """Refuse by name what an adapter asks for that no stage can do."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise UnsupportedOperationError(
            f"{what} is configured by {type(config).__name__}: of peft's adapters, a sharded model supports LoraConfig"
        )
    for name, remedy in _WITHOUT.items():
        value = getattr(config, name, None)
        if value:
            raise UnsupportedOperationError(f"{name}={value!r} of {what}: {remedy}")
    if config.bias != "none":
        raise UnsupportedOperationError(
            f"bias={config.bias!r} of {what}: the biases of the base model stay; use bias='none'"
        )
    if config.init_lora_weights not in _INITS:
        raise UnsupportedOperationError(
            f"init_lora_weights={config.init_lora_weights!r} of {what} changes the base model: convert the adapter as "
            "peft's documentation says (path_initial_model_for_weight_conversion)"
        )
    return config


class AdapterTensors:
    """The tensors of an adapter, from a file or given, by their names in the file without peft's prefix."""

    def __init__(self, where: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.where = where
        self.shapes = shapes
        self.read = read

    @classmethod
    def of_file(cls, folder: str, **hub: Any) -> AdapterTensors:
        """Open an adapter's file; raise CheckpointError if there is none, or only a pickled one."""
        found = find_file(folder, _WEIGHTS, **hub)
        if found is None:
            if find_file(folder, _PICKLED, **hub) is not None:
                raise CheckpointError(
                    f"{folder} has its tensors in {_PICKLED}, a pickle, which can run any code: load it with peft where you trust "
                    "it, and save it with safe_serialization=True"
                )
            raise CheckpointError(f"{folder} has no {_WEIGHTS}: copy the whole adapter again")
        file = SafetensorsFile(identify_file(found))
        names = {_short(name): name for name in file.entries}

        def read(name: str) -> Tensor:
            try:
                return file.read_tensor(names[name])
            finally:
                file.close()

        return cls(found, {name: file.entries[full].shape for name, full in names.items()}, read)

    @classmethod
    def of_dict(cls, tensors: Mapping[str, Tensor]) -> AdapterTensors:
        """Take the tensors of a dictionary."""
        given = {_short(name): tensor for name, tensor in tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        return cls("adapter_state_dict", shapes, given.__getitem__)


@dataclasses.dataclass(frozen=True, slots=True)
class OpenAdapter:
    """An adapter that fits a model: its configuration, and which of its tensors belongs where."""

    config: LoraConfig
    tensors: AdapterTensors
    places: Mapping[tuple[str, str], str]  # names of tensors, by the path of a module and the tensor's name below it
    copies: Sequence[str]  # tensors that are weights of the base model


def open_adapter(
    spec: ModelSpec,
    name: str,
    folder: str,
    given_config: object = None,
    given_tensors: Mapping[str, Tensor] | None = None,
    **hub: Any,
) -> OpenAdapter:
    """Read an adapter's configuration and the header of its file, in place of what is given; raise if it can't be used."""
    if not is_available():
        raise UnsupportedOperationError(
            "adapters need peft: pip install 'lingualinked[adapters]', here and for each worker"
        )
    config = read_config(find_config(folder, **hub)) if given_config is None else _as_config(given_config)
    config = check_config(config, f"adapter {folder or name!r}")
    config.inference_mode = True
    tensors = AdapterTensors.of_file(folder, **hub) if given_tensors is None else AdapterTensors.of_dict(given_tensors)
    places, copies = _match_tensors(spec, config, name, tensors)
    return OpenAdapter(config, tensors, places, copies)


def is_available() -> bool:
    """Return whether peft is installed."""
    return importlib.util.find_spec("peft") is not None


def _as_config(given: object) -> object:
    if not isinstance(given, Mapping):
        return given
    from peft import LoraConfig

    kind = given.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedOperationError(f"peft_type={kind!r}: of peft's adapters, a sharded model supports LORA")
    try:
        return LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"peft_config is not a configuration of LoRA: {error}") from error


def _match_tensors(
    spec: ModelSpec, config: LoraConfig, name: str, tensors: AdapterTensors
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return the places of an adapter's tensors, and the names of those that are weights of the base model.

    Lets peft wrap a model without data; raises CheckpointError if the tensors are not those that it then has.
    """
    from peft import inject_adapter_in_model

    # 1) what peft would make of the base model
    meta = build_meta(spec)
    try:
        with warnings.catch_warnings(action="ignore"):  # the model's own injection says it again
            inject_adapter_in_model(copy.deepcopy(config), meta, name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{tensors.where} does not fit {spec.class_name}: {error}") from error
    layers = AdapterLayers()
    for path, module in meta.named_modules():
        if hasattr(module, "base_layer"):
            layers.layers[path] = module
    adapter = layers.read_adapters()[name]
    # 2) what of the file belongs there
    found: dict[tuple[str, str], str] = {}
    wrong, used = [], set()
    for module, expected in zip(adapter.modules, layers.tensors_of(name).values(), strict=True):
        for inner, tensor in zip(module.tensors, expected, strict=True):
            saved = f"{module.path}.{inner.replace(f'.{name}', '', 1)}"
            if saved not in tensors.shapes and inner.startswith("lora_magnitude_vector"):
                saved = saved.removesuffix(".weight")  # as peft saves it
            if saved not in tensors.shapes:
                wrong.append(f"{saved} is missing")
            elif tensors.shapes[saved] != tuple(tensor.shape):
                wrong.append(f"{saved} is {list(tensors.shapes[saved])}, and has to be {list(tensor.shape)}")
            found[module.path, inner] = saved
            used.add(saved)
    others = [each for each in tensors.shapes if each not in used]
    copies = [each for each in others if each.removesuffix(".weight").removesuffix(".base_layer") in layers.layers]
    wrong += [f"{each} belongs to no module" for each in others if each not in copies]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{tensors.where} does not fit {spec.class_name}: {'; '.join(wrong[:3])}{more}; it is of another model, or its "
            "configuration of another adapter"
        )
    return found, copies


def check_copy(saved: str, tensor: Tensor, base: Tensor) -> None:
    """Refuse a weight of the base model that an adapter brings along, if it is not the one that the model has."""
    if not torch.equal(tensor.to(base.dtype), base):
        raise UnsupportedOperationError(
            f"the adapter has {saved}, other than the base model's: save the base model with it, and the adapter with "
            "save_embedding_layers=False"
        )


def check_name(name: object) -> str:
    """Check the name of an adapter, which becomes part of the names of its tensors."""
    if not isinstance(name, str) or not name or "." in name:
        raise ArgumentError(f"adapter_name={name!r} must be a text without dots")
    return name


def _short(name: str) -> str:
    return name.removeprefix(_PREFIX)

"""Saves a sharded model as transformers does, tensor by tensor: this process never holds the model.

Knows how transformers names files and weights; workers hold the data.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.interrupts import interruptible
from lingualinked.model.hf_internals.building import ties
from lingualinked.model.hf_internals.saving import (
    dot_natural_key,
    remove_tied_weights_from_state_dict,
    revert_weight_conversion,
)
from lingualinked.model.weights.safetensors_writer import write_file
from lingualinked.whole_file import write_whole_file

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.cutting.model_parts import ModelParts

_SHARD = re.compile(r"(.*?)-\d{5}-of-\d{5}")


class Saving:
    """Mixin with ``save_pretrained``; comes before the transformers class in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _pipeline: Pipeline
        _parts: ModelParts
        config: Any
        generation_config: Any
        can_generate: Callable[[], bool]
        num_parameters: Callable[[], int]
        state_dict: Callable[[], dict[str, Tensor]]

    @interruptible
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,  # noqa: ARG002 - for the hub, to which nothing is sent
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save config, generation config and weights, as transformers does; weights travel and are written one by one.

        Once `load_adapter` has loaded an adapter, save the active adapter alone, as transformers does.

        Parameters
        ----------
        save_directory : str or PathLike
            A folder, made if it is missing.
        is_main_process : bool
            Whether to save anything at all.
        max_shard_size : int or str
            Maximal bytes of one file, or as text (``"5GB"``); a larger tensor has a file of its own.
        variant : str or None
            Saves ``model.<variant>.safetensors``.
        save_original_format : bool
            Whether weights get the names and shapes of published checkpoints, where transformers computes with others.
        state_dict, push_to_hub, token, save_peft_format, distributed_checkpoint, **kwargs
            As in transformers; what would save other weights, or elsewhere, is refused.

        Raises
        ------
        ArgumentError
            If ``save_directory`` is a file.
        UnsupportedOperationError
            If an argument has no sharded counterpart.
        ClosedError, WorkerError, WorkerDiedError, StepTimeoutError
            If a weight can't be read; files that are complete by then stay.
        """
        self._pipeline.check_open()
        asked = {
            "state_dict": state_dict is not None,
            "push_to_hub": push_to_hub,
            "distributed_checkpoint": distributed_checkpoint,
        }
        for name in (name for name, is_asked in (asked | dict.fromkeys(kwargs, True)).items() if is_asked):
            raise UnsupportedOperationError(
                f"save_pretrained({name}=) of a sharded model: it saves its own weights to a folder; load the folder with "
                "transformers for anything else"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ArgumentError(f"save_directory={os.fspath(save_directory)!r} is a file: pass the path of a folder")
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process and getattr(self, "_hf_peft_config_loaded", False):
            _save_adapter(self, folder, save_peft_format)
        elif is_main_process:
            _save_configs(self, folder)
            _save_weights(self, folder, max_shard_size, variant, save_original_format)


def _save_adapter(model: Any, folder: Path, is_prefixed: bool) -> None:
    """Save the active adapter alone, as transformers does once an adapter has been loaded."""
    active = model.active_adapters()
    if len(active) != 1:
        raise ArgumentError(f"save_pretrained() with the active adapters {active}: set_adapter to the one to save")
    tensors = {
        f"{'base_model.model.' if is_prefixed else ''}{name}": tensor.detach().contiguous()
        for name, tensor in model.get_adapter_state_dict().items()
    }
    model.peft_config[active[0]].save_pretrained(folder)
    save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)


def _save_configs(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _save_weights(model: Any, folder: Path, max_shard_size: int | str, variant: str | None, is_original: bool) -> None:
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise UnsupportedOperationError(
            "save_pretrained() of a sharded model whose layers peft has wrapped: save the model of peft, which saves the adapter "
            "alone, or load the base model anew"
        )
    if model._parts.dropped:  # noqa: SLF001
        raise UnsupportedOperationError(
            f"save_pretrained() of a sharded model that was loaded with towers=False: no stage holds {model._parts.dropped[0]}; load it "  # noqa: SLF001
            "with towers=True"
        )
    # 1) find, without data, what is saved under which names, and from which tensor of the model it is made
    remote = model.state_dict()
    ignored = model._keys_to_ignore_on_save or ()  # noqa: SLF001 - as transformers does it
    meta = {name: _meta(tensor) for name, tensor in remote.items() if name not in ignored}
    held = remove_tied_weights_from_state_dict(meta, model)
    encoder = vars(model).get("_encoder_model")
    tied = {} if encoder is None else ties(encoder)  # of which it has a tensor of its own here
    for target in [target for target, source in tied.items() if {target, source} <= held.keys()]:
        del held[target]
    convert = functools.partial(_as_published, model) if is_original else dict
    like = {name: _meta(tensor) for name, tensor in convert(held).items()}
    source_of = {saved: name for name, tensor in held.items() for saved in convert({name: tensor})}
    if source_of.keys() != like.keys():
        raise UnsupportedOperationError(
            f"save_pretrained() of a sharded {type(model).__name__}: it saves {min(source_of.keys() ^ like.keys())}, which is made "
            "of several weights; pass save_original_format=False, or save the unsharded model"
        )
    # 2) split it into files, and remove those of an earlier save that are not replaced
    weights_name = _with_variant(SAFE_WEIGHTS_NAME, variant)
    pattern = weights_name.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(like, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file in folder.glob(f"{weights_name.removesuffix('.safetensors')}*.safetensors"):
        if file.name not in split.filename_to_tensors and _SHARD.fullmatch(file.stem):
            file.unlink()
    # 3) read and write one tensor after the other, in the order of the safetensors library; but those that are made of one
    # follow each other, so that it is read once
    converted: dict[str, Tensor] = {}

    def read(saved: str) -> Tensor:
        if saved not in converted:
            converted.clear()
            name = source_of[saved]
            tensor = remote[name]
            owner = _owner_of(model, name)
            data = owner._pipeline.weights.read(owner._parts, tensor.remote_name, tensor.shape, tensor.dtype)  # noqa: SLF001
            converted.update(convert({name: data}))
        return converted.pop(saved)

    for name, names in split.filename_to_tensors.items():
        order = sorted(names, key=lambda each: (-like[each].element_size(), source_of[each], each))
        write_file(folder / name, {each: like[each] for each in order}, read)
    # 4) write the index
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        path = folder / _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
        write_whole_file(path, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _owner_of(model: Any, name: str) -> Any:
    """Return the model whose stages hold a weight: of an encoder-decoder model, that of the encoder has those of its stack."""
    encoder = vars(model).get("_encoder_model")
    is_encoders = encoder is not None and name.startswith(f"{encoder._parts.layers.rpartition('.')[0]}.")  # noqa: SLF001
    return encoder if is_encoders else model


def _as_published(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names and in the shapes of published checkpoints: experts one by one, for example."""
    in_order = dict(sorted(state.items(), key=lambda item: dot_natural_key(item[0])))  # as of a model that was loaded
    converted: dict[str, Tensor] = revert_weight_conversion(model, in_order)
    return converted


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"

"""The methods of a sharded model that load, switch, mix and remove adapters, as transformers and peft name them.

What they change in this process are peft's own layers; before each step, the stages get what has changed.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lingualinked.errors import ArgumentError, LingualinkedError, UnsupportedOperationError
from lingualinked.interrupts import interruptible
from lingualinked.sharded.adapters.adapter_files import check_copy, check_name, open_adapter
from lingualinked.sharded.adapters.adapter_layers import AdapterLayers

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.adapters.adapter_data import AdapterUse
    from lingualinked.model.cutting.model_parts import ModelParts

row_adapters: contextvars.ContextVar[tuple[object, Sequence[str] | None]] = contextvars.ContextVar(
    "row_adapters", default=(None, None)
)
"""The model that generates, and the adapters of the rows that it was called with."""

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class Adapters:
    """Mixin with the methods for adapters; comes before the transformers class in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _pipeline: Pipeline
        _parts: ModelParts
        _adapters: AdapterLayers
        _adapters_lock: threading.Lock
        eval: Callable[[], Any]
        get_submodule: Callable[[str], Any]
        peft_config: dict[str, Any]

    @interruptible
    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,  # noqa: ARG002 - the result is the same
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        local_files_only: bool = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        load_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA adapter, as transformers does, and make it the active one.

        Parameters
        ----------
        peft_model_id : str or PathLike or None
            A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or an id of the Hugging Face hub.
        adapter_name : str or None
            Its name from now on; ``None``: "default".
        peft_config : peft.LoraConfig or dict or None
            Its configuration, in place of the one in the folder.
        adapter_state_dict : mapping of str to Tensor or None
            Its tensors, in place of those in the folder.
        low_cpu_mem_usage, local_files_only, adapter_kwargs, **kwargs
            As in transformers; what a sharded model can't do is refused by name.
        is_trainable, hotswap, load_config
            Refused unless they ask for nothing: a sharded model does not train, and adapters are added and deleted.

        Raises
        ------
        ArgumentError
            If the name is taken, or no adapter is given.
        CheckpointError
            If the adapter is missing, damaged, pickled, or of another model.
        UnsupportedOperationError
            If it is not LoRA, or asks for more than linear layers and embeddings of the base model.
        WorkerError, WorkerDiedError, StepTimeoutError, ClosedError
            If a stage can't get it.
        """
        self._pipeline.check_open()
        # 1) check the arguments, the configuration and the file
        name = check_name("default" if adapter_name is None else adapter_name)
        asked = {"is_trainable": is_trainable, "hotswap": hotswap is True, "load_config": load_config is not None}
        for what in (what for what, is_asked in asked.items() if is_asked):
            raise UnsupportedOperationError(
                f"load_adapter({what}=) of a sharded model: leave it out; it is for inference"
            )
        if name in getattr(self, "peft_config", {}):
            raise ArgumentError(
                f"an adapter {name!r} is loaded already: choose another adapter_name, or delete_adapter first"
            )
        if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
            raise ArgumentError(
                "load_adapter() without an adapter: pass its folder, or peft_config and adapter_state_dict"
            )
        hub = {"local_files_only": local_files_only, **kwargs, **(adapter_kwargs or {})}
        unknown = sorted(hub.keys() - set(_HUB_ARGUMENTS))
        if unknown:
            raise UnsupportedOperationError(f"load_adapter({unknown[0]}=) of a sharded model: leave it out")
        if self._pipeline.edits.skips.indices:
            raise UnsupportedOperationError(
                "load_adapter() of a sharded model without some of its layers, whose numbers are no longer the adapter's: put them "
                "back, load the adapter, and then remove them"
            )
        folder = "" if peft_model_id is None else os.fspath(peft_model_id)
        adapter = open_adapter(self._pipeline.spec, name, folder, peft_config, adapter_state_dict, **hub)
        for saved in adapter.copies:
            weight = self.get_submodule(saved.removesuffix(".weight").removesuffix(".base_layer")).weight
            check_copy(saved, adapter.tensors.read(saved), torch.clone(weight))
        # 2) let peft wrap the modules in this process, and fill in the tensors
        from peft import inject_adapter_in_model

        # Tensors made in inference mode would count no changes.
        with warnings.catch_warnings(), torch.inference_mode(False):
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # it is meant
            inject_adapter_in_model(adapter.config, self, name)
        self._hf_peft_config_loaded = True
        with torch.inference_mode(False), torch.no_grad():
            for (path, inner), saved in adapter.places.items():
                owner, _, attribute = inner.rpartition(".")
                getattr(self.get_submodule(path).get_submodule(owner), attribute).copy_(adapter.tensors.read(saved))
        self.eval()
        for layer in self._adapters.layers.values():
            layer.requires_grad_(False)
        # 3) put it into the stages
        self._send_adapters()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **kwargs: Any,
    ) -> None:
        """Make a new adapter of loaded ones, by peft's own method of this name (of ``LoraModel``); `set_adapter` activates it.

        Parameters
        ----------
        adapters : sequence of str
            The names of adapters.
        weights : sequence of float
            A weight for each.
        adapter_name : str
            The name of the new one.
        combination_type : str
            As in peft: "svd", "linear", "cat", "ties" and others.
        **kwargs
            Further arguments of peft's method.

        Raises
        ------
        ArgumentError
            If an adapter is not loaded, the name is taken, or peft can't combine them so.
        """
        from peft import LoraModel

        self._pipeline.check_open()
        loaded = getattr(self, "peft_config", {})
        if check_name(adapter_name) in loaded:
            raise ArgumentError(f"an adapter {adapter_name!r} is loaded already: choose another adapter_name")
        # peft's method needs its own view of the model, without wrapping anything again.
        view: Any = LoraModel.__new__(LoraModel)
        nn.Module.__init__(view)
        view.model, view.peft_config = self, loaded
        view.active_adapter = self.active_adapters()  # type: ignore[attr-defined]
        view.targeted_module_names, view.targeted_parameter_names = [], []
        try:
            with warnings.catch_warnings(action="ignore"):  # of names that it does not look for anew
                view.add_weighted_adapter(list(adapters), list(weights), adapter_name, combination_type, **kwargs)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"add_weighted_adapter(): {error}") from error
        for layer in self._adapters.layers.values():
            layer.eval()

    def _send_adapters(self) -> None:
        """Make the stages have the adapters that this process has."""
        remote = self._pipeline.adapters
        with self._adapters_lock:
            held, sent = self._adapters.read_adapters(), remote.numbers
            for name, adapter in held.items():
                if sent.get(name) != adapter.number:
                    if name in sent:
                        remote.remove(name)
                    remote.put(self._parts, adapter, self._adapters.tensors_of(name))
            for name in sent.keys() - held.keys():
                remote.remove(name)

    def _use_adapters(self, rows: Sequence[str] | None, num_rows: int) -> AdapterUse | None:
        """Return what a step of so many rows computes with, once the stages have it."""
        generating, asked = row_adapters.get()
        if rows is None and generating is self and asked is not None:
            repeats = num_rows // max(1, len(asked))  # of beams
            rows = [name for name in asked for _ in range(max(1, repeats))]
        if not self._adapters.num_changes and rows is None:
            return None  # no adapter has ever been here
        if self._adapters.num_changes:
            self._send_adapters()
        self._adapters.check_hooks()
        skipped = tuple(f"{self._parts.layers}.{index}." for index in self._pipeline.edits.skips.indices)
        return self._adapters.read_use(rows, num_rows, skipped)


def _named(name: str) -> Any:
    """Return transformers' method of this name, whose errors are those of this library."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(Adapters, self), name)(*args, **kwargs)
        except LingualinkedError:
            raise
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{name}(): {error}") from error

    from transformers import PreTrainedModel

    return functools.wraps(getattr(PreTrainedModel, name))(method)


for _name in (
    "active_adapters",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "get_adapter_state_dict",
    "set_adapter",
):
    setattr(Adapters, _name, _named(_name))

"""The adapters of one stage: peft's own layers around the modules that they change, and which are active in a step.

Knows peft and a cut model; neither files nor where adapters come from. Imports peft with the first adapter.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lingualinked.errors import ArgumentError
from lingualinked.model.cutting.cut import StandIn
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.hf_internals.building import GLOBAL_STATE
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lingualinked.model.adapters.adapter_data import AdaptedModule, Adapter, AdapterUse

_NUMBERS = "lingualinked_numbers"  # attribute of peft's layers: which content each adapter has there
_BASE = ".base_layer"


class StageAdapters:
    """The adapter layers of a cut model, which other stages of this process may share."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self.layers: dict[str, Any] = {path: each for path, each in model.named_modules() if hasattr(each, _NUMBERS)}

    def __bool__(self) -> bool:
        return any(getattr(layer, _NUMBERS) for layer in self.layers.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters' tensors."""
        return sum(
            parameter.nbytes
            for layer in self.layers.values()
            for name, parameter in layer.named_parameters()
            if not name.startswith(_BASE[1:])
        )

    def add(self, adapter: Adapter, tensors: Sequence[Tensor]) -> None:
        """Put modules of an adapter in place, with their tensors; raise ArgumentError if something does not fit."""
        if sum(len(module.tensors) for module in adapter.modules) != len(tensors):
            raise ArgumentError(
                f"adapter {adapter.name!r} arrived with {count_text(len(tensors), 'tensor')}, which are not those of its modules"
            )
        # 1) those that another stage here has put in place already stay
        remaining = list(tensors)
        wanted = []
        for module in adapter.modules:
            given, remaining = remaining[: len(module.tensors)], remaining[len(module.tensors) :]
            held = getattr(self._find(module.path), _NUMBERS, {})
            if held.get(adapter.name) != adapter.number:
                wanted.append((module, given))
            else:
                self.layers[module.path] = self._find(module.path)
        # 2) let peft wrap the others
        with GLOBAL_STATE:  # no module is copied or computed with meanwhile
            for use_dora, has_bias in {(module.use_dora, module.has_bias) for module, _ in wanted}:
                alike = [each for each, _ in wanted if (each.use_dora, each.has_bias) == (use_dora, has_bias)]
                self._inject(adapter.name, alike, use_dora=use_dora, has_bias=has_bias)
            # 3) fill in the tensors
            for module, given in wanted:
                self._fill(adapter, module, given)

    def remove(self, name: str) -> None:
        """Remove an adapter from all layers; its modules then compute as before."""
        for layer in self.layers.values():
            if getattr(layer, _NUMBERS).pop(name, None) is not None:
                with warnings.catch_warnings(action="ignore"):  # of which one is active next: every step says it
                    layer.delete_adapter(name)

    @contextlib.contextmanager
    def used(self, use: AdapterUse | None) -> Iterator[None]:
        """Make a step's adapters the active ones within the context. Needs `GLOBAL_STATE`."""
        hooks = []
        names, is_disabled = ([], True) if use is None else (list(use.names), use.is_disabled)
        for layer in self.layers.values():
            # Not by set_adapter, which also asks for gradients, nor by setattr, which searches.
            vars(layer).update(_active_adapter=names, _disable_adapters=is_disabled)
            if use is not None and use.rows is not None:
                hooks.append(layer.register_forward_pre_hook(_name_rows(list(use.rows)), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _find(self, path: str) -> Any:
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            module = StandIn()
        if isinstance(module, StandIn):
            raise ArgumentError(f"an adapter changes {path!r}, which this stage does not hold")
        return module

    def _inject(self, name: str, modules: list[AdaptedModule], *, use_dora: bool, has_bias: bool) -> None:
        """Make peft wrap modules, with random tensors."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ArgumentError(f"adapters need peft: pip install 'lingualinked[adapters]' ({error})") from error
        # peft wraps layers of torch's class: a packed one is wrapped in place of a layer like it, without its weight
        packed: dict[str, PackedLinear] = {}
        for module in modules:
            path, base = find_base(module.path, self._find(module.path))
            if isinstance(base, PackedLinear):
                plain = base.plain()
                if use_dora:  # which needs the weight
                    plain.weight = nn.Parameter(base.unpacked(), requires_grad=False)
                else:
                    packed[module.path] = base
                self._model.set_submodule(path, plain)
        config = LoraConfig(
            target_modules=[module.path for module in modules],
            rank_pattern={re.escape(module.path): module.rank for module in modules},
            use_dora=use_dora,
            lora_bias=has_bias,
            init_lora_weights=False,
            inference_mode=True,
        )
        vars(self._model).pop("peft_config", None)  # each adapter is one by itself here
        try:
            with warnings.catch_warnings(action="ignore"):  # the caller's own injection has said it
                inject_adapter_in_model(config, self._model, name)
        except ValueError as error:
            raise ArgumentError(f"peft can't put adapter {name!r} into this stage: {error}") from error
        finally:
            vars(self._model).pop("peft_config", None)
            for path, base in packed.items():
                self._model.set_submodule(find_base(path, self._find(path))[0], base)

    def _fill(self, adapter: Adapter, module: AdaptedModule, tensors: Sequence[Tensor]) -> None:
        layer = self._find(module.path)
        for name, tensor in zip(module.tensors, tensors, strict=True):
            path, _, attribute = name.rpartition(".")
            owner = layer.get_submodule(path)
            held = getattr(owner, attribute)
            if held.shape != tensor.shape:
                raise ArgumentError(
                    f"{name} of adapter {adapter.name!r} at {module.path} has the shape {list(tensor.shape)}, "
                    f"where the base model needs {list(held.shape)}"
                )
            setattr(owner, attribute, nn.Parameter(tensor.to(self._device), requires_grad=False))
        layer.scaling[adapter.name] = module.scaling
        layer.eval()
        if not hasattr(layer, _NUMBERS):
            setattr(layer, _NUMBERS, {})
        getattr(layer, _NUMBERS)[adapter.name] = adapter.number
        self.layers[module.path] = layer


def find_base(path: str, module: Any) -> tuple[str, Any]:
    """Return the module that an adapter layer wraps, and its path; or a module itself that none wraps."""
    return (f"{path}{_BASE}", module.base_layer) if hasattr(module, _BASE[1:]) else (path, module)


def _name_rows(rows: list[str]) -> Any:
    """Return a hook that says to an adapter layer which adapter each row is for, as peft's own models do."""
    return lambda _module, args, kwargs: (args, {**kwargs, "adapter_names": rows})

"""Finds the parts of a model: its layers, and what runs before and after them, with their bytes.

Works on the meta device, without weights; knows no stages, devices or checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lingualinked.errors import ArgumentError, CheckpointError, UncuttableModelError
from lingualinked.model.cutting.architectures import SUPPORTED_ARCHITECTURES, read_config
from lingualinked.model.hf_internals import building
from lingualinked.quantities import count_text
from lingualinked.weight_bytes import WeightBytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lingualinked.model.spec import ModelSpec


_found: dict[tuple[str, str, str], ModelParts] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """Where a model's parts are, as dotted paths of modules, and the bytes of their weights."""

    layers: str  # the decoder's module list: "model.layers"
    num_layers: int
    prologue: tuple[str, ...]  # modules with weights that run before the first layer: ("model.embed_tokens",)
    epilogue: tuple[str, ...]  # likewise after the last layer: ("model.norm", "lm_head")
    weights: WeightBytes

    def span_bytes(self, start: int, end: int) -> int:
        """Return the weight bytes of a stage of layers ``[start, end)``; raise ArgumentError unless the model has them."""
        check_span(start, end, self.num_layers)
        return self.weights.of_span(start, end)

    def needs(self, name: str, start: int, end: int) -> bool:
        """Return whether a stage of layers ``[start, end)`` may need a parameter, of its layers or of the ends of the model."""
        layer = self.layer_of(name)
        return start <= layer < end if layer is not None else start == 0 or end == self.num_layers

    def is_in_every_stage(self, path: str) -> bool:
        """Return whether every stage runs a module for itself, such as what computes positions."""
        is_in_one = any(f"{path}.".startswith(f"{each}.") for each in (self.layers, *self.prologue, *self.epilogue))
        return not (is_in_one or f"{self.layers}.".startswith(f"{path}."))

    def layer_beside(self, path: str, *, at_end: bool) -> int:
        """Return a layer whose stage runs a module; of one that runs all layers, its beginning or its end."""
        layer = self.layer_of(f"{path}.weight")
        runs_last = any(f"{path}.".startswith(f"{each}.") for each in self.epilogue)
        if layer is None and (runs_last or (at_end and f"{self.layers}.".startswith(f"{path}."))):
            return self.num_layers - 1
        return layer or 0

    def holds(self, path: str, start: int, end: int) -> bool:
        """Return whether a stage of layers ``[start, end)`` holds the module of a path: of a layer, or of an end of the model."""
        layer = self.layer_of(f"{path}.weight")
        if layer is not None:
            return start <= layer < end
        ends = (self.prologue if start == 0 else ()) + (self.epilogue if end == self.num_layers else ())
        return any(f"{path}.".startswith(f"{each}.") for each in ends)

    def layer_of(self, name: str) -> int | None:
        """Return the layer of a parameter of the whole model, or None if it belongs to no layer."""
        path, _, rest = name.removeprefix(f"{self.layers}.").partition(".")
        return int(path) if name.startswith(f"{self.layers}.") and rest and path.isdecimal() else None


def check_span(start: int, end: int, num_layers: int) -> None:
    """Raise ArgumentError unless ``[start, end)`` is a span of a model of `num_layers` layers."""
    if not 0 <= start < end <= num_layers:
        raise ArgumentError(
            f"[{start}, {end}) is not a span of a model of {count_text(num_layers, 'layer')}: 0 <= start < end <= {num_layers} must hold"
        )


def build_meta(spec: ModelSpec) -> PreTrainedModel:
    """Build the full model on the meta device, in evaluation mode, with all modules and shapes, but without memory."""
    if spec.class_name not in SUPPORTED_ARCHITECTURES.values():
        raise UncuttableModelError(
            spec.class_name, "it is not among the architectures that are tested to be exact when cut"
        )
    cls: type[PreTrainedModel] = getattr(transformers, spec.class_name)
    try:
        return building.build_on_meta(cls, read_config(spec), getattr(torch, spec.dtype), spec.attn_implementation)
    except (ImportError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError) as error:
        cause = f"{type(error).__name__}: {error}"
        if spec.attn_implementation is not None:
            raise ArgumentError(
                f"attn_implementation={spec.attn_implementation!r} can't be used with {spec.class_name} here: {cause}"
            ) from error
        raise CheckpointError(f"{spec.class_name} can't be built from its config: {cause}") from error


def find_parts(meta_model: PreTrainedModel) -> ModelParts:
    """Find the layers of a causal LM on the meta device and what runs before and after them.

    One forward pass, stopped at the first layer, shows which modules run before the layers.
    """
    name = type(meta_model).__name__
    path, layers = _find_layers(meta_model)
    outside = [
        (module_path, module)
        for module_path, module in meta_model.named_modules()
        if not f"{module_path}.".startswith(f"{path}.") and _holds_parameters(module)
    ]
    for module_path, module in outside:
        if isinstance(module, PreTrainedModel):
            owned = ", ".join(name for name, _ in module.named_parameters(recurse=False))
            raise UncuttableModelError(name, f"{module_path or 'the model'} itself holds parameters ({owned})")
    called = _called_before_layers(meta_model, layers, [module for _, module in outside])
    prologue = {module_path: module for module_path, module in outside if module in called}
    epilogue = {module_path: module for module_path, module in outside if module not in called}
    in_prologue, in_epilogue = _own_parameters(prologue), _own_parameters(epilogue)
    tied = building.ties(meta_model)
    in_both = {target for target, source in tied.items() if target in in_epilogue and source in in_prologue}
    return ModelParts(
        layers=path,
        num_layers=len(layers),
        prologue=tuple(prologue),
        epilogue=tuple(epilogue),
        weights=WeightBytes(
            layers=tuple(_num_bytes(layer.parameters()) for layer in layers),
            prologue=_num_bytes(in_prologue.values()),
            epilogue=_num_bytes(in_epilogue.values()),
            tied=_num_bytes(in_epilogue[target] for target in in_both),
        ),
    )


def parts_of(spec: ModelSpec, meta_model: PreTrainedModel) -> ModelParts:
    """Return the parts of a model that was built from `spec`; they are found once, since the weights do not count."""
    key = (spec.class_name, spec.config_json, spec.dtype)
    if key not in _found:
        _found[key] = find_parts(meta_model)
    return _found[key]


def cache_slots(layers: Iterable[nn.Module]) -> frozenset[int]:
    """Return the slots of a KV cache of transformers that layers write to."""
    names = "layer_idx", "layer_id", "layer_number"
    indices = (getattr(module, name, None) for layer in layers for module in layer.modules() for name in names)
    return frozenset(index for index in indices if isinstance(index, int) and index >= 0)


def learned_positions(meta_model: PreTrainedModel) -> int | None:
    """Return how many positions a model has learned embeddings for; None if positions are computed (rotary, ALiBi)."""
    words = meta_model.get_input_embeddings()
    if any(isinstance(module, nn.Embedding) and module is not words for module in meta_model.modules()):
        return int(meta_model.config.get_text_config(decoder=True).max_position_embeddings)
    return None


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the largest module list with as many modules as the decoder has layers."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not candidates:
        raise UncuttableModelError(
            type(model).__name__, f"no module list holds its {count_text(num_layers, 'decoder layer')}"
        )
    return max(candidates, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))


class _LayersReached(Exception):  # noqa: N818 - it ends a forward pass and is not an error
    """The forward pass has reached the first layer."""


class _ProbeLayer(nn.Module):
    """Replaces the first layer during the probe."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        raise _LayersReached


class NoData(TorchFunctionMode):
    """Makes tests of a tensor's values (``bool``, ``in``) return False, so that a forward pass runs on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.__bool__, torch.Tensor.__contains__):
            return False
        return func(*args, **(kwargs or {}))


def _called_before_layers(model: PreTrainedModel, layers: nn.ModuleList, watched: list[nn.Module]) -> set[nn.Module]:
    """Run the model up to its first layer; return the watched modules that were called."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in watched]
    first, layers[0] = layers[0], _ProbeLayer()
    try:
        with torch.no_grad(), NoData():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device="meta"), use_cache=False)
    except _LayersReached:
        return called
    except Exception as error:
        raise UncuttableModelError(
            type(model).__name__, f"a forward pass without weights failed before the first layer ({error!r})"
        ) from error
    finally:
        layers[0] = first
        for hook in hooks:
            hook.remove()
    raise UncuttableModelError(type(model).__name__, "a forward pass does not reach the first layer")


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _own_parameters(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that modules hold directly, by full name; tied ones under each of their names."""
    return {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(each): each.numel() * each.element_size() for each in parameters}.values())

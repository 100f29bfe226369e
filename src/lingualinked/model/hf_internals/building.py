"""Builds models of transformers without memory, and says what their parameters share.

Knows how transformers constructs; no weights, spans or stages.
"""

from __future__ import annotations

import copy
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import activations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from transformers import PreTrainedConfig, PreTrainedModel

GLOBAL_STATE = threading.RLock()
"""Held while transformers constructs a model, and while a stage computes.

Construction sets torch's default dtype and replaces functions of torch for the whole process, including other threads.
"""


_FILLING = {
    *(getattr(torch.nn.init, name) for name in ("constant_", "kaiming_uniform_", "normal_", "uniform_")),
    *(getattr(torch.Tensor, name) for name in ("fill_", "normal_", "uniform_", "zero_")),
}


class _LeaveUnfilled(TorchFunctionMode):
    """Leaves tensors on the meta device alone where a module fills its parameters: torch takes long over what has no values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


def build_on_meta(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """Build a model without memory, with the dtype and the attention implementation that loading would give it."""
    arguments = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with GLOBAL_STATE, torch.device("meta"), _LeaveUnfilled():
        model: PreTrainedModel = cls._from_config(config, dtype=dtype, **arguments)
        if not all(parameter.is_meta for parameter in model.parameters()):  # made by old constructors of torch
            to_meta: Any = model.to
            to_meta("meta")
    _own_modules(model)
    model.eval()
    return model


def _own_modules(model: PreTrainedModel) -> None:
    """Replace what a model shares with all others of the process by its own: some activations are made once, with their module."""
    sources = [vars(sys.modules[cls.__module__]) for cls in type(model).__mro__ if cls.__module__ in sys.modules]
    held = [value for source in (*sources, vars(activations)) for value in list(source.values())]
    held += [value for each in held if isinstance(each, dict) for value in list(each.values())]
    own = {id(each): each for each in held if isinstance(each, torch.nn.Module)}
    copies: dict[int, torch.nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in own:
                module._modules[name] = copies.setdefault(id(child), copy.deepcopy(own[id(child)]))


def decode_floats(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration's JSON with numbers in place of what stands for infinity there."""
    decoded: dict[str, Any] = config_class._decode_special_floats(fields)
    return decoded


def build_untrained(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None, seed: int
) -> PreTrainedModel:
    """Build a model on the CPU with the weights that its class begins to train with; torch's own generator is left alone."""
    arguments = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with GLOBAL_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = cls._from_config(config, dtype=dtype, **arguments)
    model.eval()
    return model


def exclusive_init_context(cls: type[PreTrainedModel]) -> Any:
    """Return a ``get_init_context`` for a class derived from `cls` that holds `GLOBAL_STATE` during construction."""

    def get_init_context(_derived: type, *args: Any, **kwargs: Any) -> list[Any]:
        return [GLOBAL_STATE, *cls.get_init_context(*args, **kwargs), _LeaveUnfilled()]

    return classmethod(get_init_context)


def makes_pipeline_for_device(frame: FrameType | None) -> bool:
    """Return whether a frame makes a ``transformers.pipeline`` with a device, which refuses models with a device map."""
    if frame is None or frame.f_globals.get("__name__") != "transformers.pipelines.base":
        return False
    return frame.f_code.co_qualname == "Pipeline.__init__" and frame.f_locals.get("device") is not None


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Return the tied parameters of a model, as ``{target: source}``."""
    return dict(model.all_tied_weights_keys)


def set_ties(model: PreTrainedModel, tied: dict[str, str]) -> None:
    """Set the parameters that the loader ties."""
    model.all_tied_weights_keys = tied


def mark_initialized(model: PreTrainedModel) -> None:
    """Mark the weights of all modules as loaded, so that transformers' initialisation leaves them alone."""
    for module in model.modules():
        vars(module)["_is_hf_initialized"] = True

"""RMS norms of few rows in one pass over memory, by a kernel that has been found to have the bits of a module's own forward.

Knows modules that have the parts of such a norm; no models and no stages.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lingualinked.kernels import norm
from lingualinked.model.exact.norm_probe import NormShape, find_kind
from lingualinked.model.exact.rows_alone import count_rows

_EPSILON_NAMES = ("variance_epsilon", "eps")
_OWNERS = "transformers.models."  # the names of whose classes tell them apart in what probes keep
_ATTRIBUTES = frozenset(vars(nn.Module()))  # of any module


class FasterNorm(nn.Module):
    """Base of the classes of norms whose few rows the kernel computes."""

    epsilon_name: str


def speed_up_norms(model: nn.Module) -> None:
    """Make norms of a CPU model compute few rows by the kernel, in place, where that is exact.

    A module keeps its parameters, hooks and attributes. Its class becomes one that is derived from its own, by the same name.
    """
    for module in model.modules():
        name = "" if isinstance(module, FasterNorm) else _epsilon_name(module)
        module_class: Any = type(module)
        if name and find_kind(_shape(module_class, name, module.get_parameter("weight"), 1)) is not None:
            module.__class__ = _faster_class(module_class, name)


def kernel_of(module: FasterNorm, num_rows: int) -> tuple[Tensor, norm.Kind, float] | None:
    """Return weight, kind and epsilon of a norm whose so many rows the kernel computes; None if it does not."""
    module_class, name = type(module).__mro__[2], type(module).epsilon_name
    weight, epsilon = module.get_parameter("weight"), vars(module).get(name)
    kind = find_kind(_shape(module_class, name, weight, num_rows))
    return None if kind is None or type(epsilon) is not float or not weight.is_contiguous() else (weight, kind, epsilon)


def describe_norms(dtypes: Iterable[torch.dtype]) -> str:
    """Say what computes a Llama's norm of one row in each dtype, with the present number of threads."""
    kinds = {
        dtype: find_kind(_shape(LlamaRMSNorm, "variance_epsilon", torch.ones(2048, dtype=dtype), 1)) for dtype in dtypes
    }
    names = {dtype: "torch's own" if kind is None else "norm.c" for dtype, kind in kinds.items()}
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {name}" for dtype, name in names.items())


def _epsilon_name(module: nn.Module) -> str:
    """Return the name of a norm's epsilon; of a module with other parts than an epsilon and a weight, an empty string."""
    [name, *others] = [name for name in vars(module) if name not in _ATTRIBUTES and name[0] != "_"] or [""]
    parameters = [(key, each.dim()) for key, each in module.named_parameters()]
    is_norm = (
        type(module).__module__.startswith(_OWNERS)
        and name in _EPSILON_NAMES
        and not [*others, *module.children(), *module.buffers()]
        and parameters == [("weight", 1)]
    )
    return name if is_norm else ""


@functools.cache
def _faster_class(module_class: Any, epsilon_name: str) -> type[nn.Module]:
    own_forward = module_class.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and module_class.forward is own_forward:
            states, weight, epsilon = args[0], self._parameters.get("weight"), vars(self).get(epsilon_name)
            if weight is not None and type(epsilon) is float and not self.training and _is_plain(states, weight):
                kind = find_kind(
                    _shape(module_class, epsilon_name, weight, count_rows(states.numel() // weight.numel()))
                )
                result = None if kind is None else norm.normalise(states, weight, kind, epsilon)
                if result is not None:
                    return result
        return module_class.forward(self, *args, **kwargs)

    names = {name: getattr(module_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        module_class.__name__, (FasterNorm, module_class), {**names, "forward": forward, "epsilon_name": epsilon_name}
    )


def _shape(module_class: type[nn.Module], epsilon_name: str, weight: Tensor, num_rows: int) -> NormShape:
    return NormShape(module_class, epsilon_name, weight.dtype, num_rows, weight.numel(), torch.get_num_threads())


def _is_plain(states: Any, weight: Tensor) -> bool:
    """Say whether torch normalises these states with the kernels of its default settings, without gradients."""
    return (
        type(states) is Tensor
        and type(weight) is nn.Parameter
        and states.dtype is weight.dtype
        and states.is_cpu
        and weight.is_cpu
        and states.is_contiguous()
        and weight.is_contiguous()
        and weight.shape == states.shape[-1:]
        and states.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )

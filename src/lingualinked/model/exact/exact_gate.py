"""Products of activations with other values in one pass over memory, in modules that have been found to multiply gates so.

Knows modules of three linear layers and an activation; no models and no stages.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from lingualinked.kernels import gated
from lingualinked.model.exact.bits import DIGITS, have_equal_bits, tiny
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.exact.row_probe import has_free_elements
from lingualinked.model.process.torch_settings import flushes_denormals

_OWNERS = ("torch.nn.modules.activation", "transformers.activations")
_INPUTS, _GATES = 8, 24  # of the module that is tried
_ATTRIBUTES = frozenset(vars(nn.Module()))  # of any module
_SCALES = (1.0, 2.0**-6, 2.0**9)  # of its inputs: some modules limit what is large

_tables: dict[tuple[tuple[object, ...], torch.dtype, int, int], Tensor | None] = {}


class GatedParts(NamedTuple):
    """The names of a module's parts, which computes ``last(activation(gate(x)) * other(x))``."""

    gate: str
    other: str
    last: str
    activation: str


class FasterGate(nn.Module):
    """Base of the classes of modules whose gates the kernel multiplies."""

    gated_parts: GatedParts


def speed_up_gates(model: nn.Module) -> None:
    """Make modules of a CPU model multiply gates by the kernel, in place, where that is exact.

    A module keeps its parts, hooks and attributes. Its class becomes one that is derived from its own, by the same name.
    """
    if not gated.is_available():
        return
    for module in model.modules():
        parts = None if isinstance(module, FasterGate) else find_parts(module)
        if parts is not None:
            module_class: Any = type(module)
            module.__class__ = _faster_class(module_class, parts)


def find_parts(module: nn.Module) -> GatedParts | None:
    """Return the parts of a module that multiplies gates; None of another one.

    A small twin is tried, with linear layers of its own: its results show what the module's class does with them.
    """
    children = dict(module.named_children())
    linears = [name for name, each in children.items() if isinstance(each, nn.Linear | PackedLinear)]
    others = [name for name in children if name not in linears]
    if len(linears) != 3 or len(others) != 1 or [*module.parameters(recurse=False), *module.buffers()]:
        return None
    activation = children[others[0]]
    if not _is_function(activation):
        return None
    for gate, other, last in itertools.permutations(linears):
        parts = GatedParts(gate, other, last, others[0])
        if _computes(module, parts, activation):
            return parts
    return None


def are_hooked(modules: tuple[nn.Module, ...]) -> bool:
    """Say whether hooks look at what these modules are called with, or return."""
    return any(each._forward_hooks or each._forward_pre_hooks for each in modules) or bool(  # noqa: SLF001 - as their call does
        torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks  # noqa: SLF001
    )


def find_table(activation: nn.Module, dtype: torch.dtype, size: int) -> Tensor | None:
    """Return the table of an activation in rows of `size`; None if it depends on more than a number, or the kernel is not exact."""
    key = _describe(activation), dtype, size, torch.get_num_threads()
    if key not in _tables:
        _tables[key] = _find_table(activation, *key)
    return _tables[key]


def _find_table(
    activation: nn.Module, key: tuple[object, ...], dtype: torch.dtype, size: int, num_threads: int
) -> Tensor | None:
    if not (
        dtype in gated.DTYPES
        and _is_function(activation)
        and has_free_elements(activation, dtype, size, num_threads)
        and multiplies_as_torch(dtype)
    ):
        return None
    for (known, known_dtype, *_), table in _tables.items():
        if known == key and known_dtype is dtype and table is not None:
            return table
    with torch.inference_mode():
        return gated.fill_table(activation, dtype)


def _describe(activation: nn.Module) -> tuple[object, ...]:
    """Return what tells an activation apart: its class, and what its constructor was given."""
    own = [(name, value) for name, value in vars(activation).items() if name not in _ATTRIBUTES]
    return type(activation), activation.training, repr(own)


def _is_function(module: nn.Module) -> bool:
    """Say whether a module may be a function of single numbers: it has neither parts nor numbers of its own."""
    own = [*module.children(), *module.parameters(), *module.buffers()]
    return type(module).__module__.startswith(_OWNERS) and not own and not module.training


def _computes(module: nn.Module, parts: GatedParts, activation: nn.Module) -> bool:
    """Say whether a module multiplies gates so in every dtype: some do it in float32 whatever the dtype of their inputs."""
    return all(_computes_in(dtype, module, parts, activation) for dtype in (torch.float32, torch.bfloat16))


def _computes_in(dtype: torch.dtype, module: nn.Module, parts: GatedParts, activation: nn.Module) -> bool:
    generator, width = torch.Generator().manual_seed(0), _INPUTS
    twin = copy.copy(module)
    made: dict[str, Any] = {}
    for name in (parts.gate, parts.other):
        made[name] = nn.Linear(width, _GATES, dtype=dtype)
    made[parts.last] = nn.Linear(_GATES, width, dtype=dtype)
    for each in made.values():
        for parameter in each.parameters():
            parameter.requires_grad_(False).normal_(generator=generator)
    vars(twin)["_modules"] = {**vars(module)["_modules"], **made}
    with torch.inference_mode():
        try:
            for scale in _SCALES:
                states = scale * torch.randn((3, 2, width), generator=generator).to(dtype)
                gates = activation(made[parts.gate](states))
                expected = made[parts.last](gates * made[parts.other](states))
                if not have_equal_bits(type(module).forward(twin, states), expected):
                    return False
        except (AttributeError, RuntimeError, TypeError):  # it has other parts, or other arguments
            return False
    return True


@functools.cache
def _faster_class(module_class: Any, parts: GatedParts) -> type[nn.Module]:
    own_forward = module_class.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and module_class.forward is own_forward:
            gate, other, last, activation = (self._modules[name] for name in parts)
            if gate is not None and other is not None and last is not None and activation is not None:
                result = _multiply(args[0], gate, other, last, activation)
                if result is not None:
                    return result
        return module_class.forward(self, *args, **kwargs)

    names = {name: getattr(module_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(module_class.__name__, (FasterGate, module_class), {**names, "forward": forward, "gated_parts": parts})


def _multiply(states: Any, gate: nn.Module, other: nn.Module, last: nn.Module, activation: nn.Module) -> Tensor | None:
    """Compute what the module would; return None if hooks look at its parts, or torch would compute otherwise."""
    if (
        type(states) is not Tensor
        or not states.is_cpu
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or flushes_denormals()  # tables were not filled so
        or are_hooked((gate, other, activation))
    ):
        return None
    gates = gate(states)
    table = find_table(activation, gates.dtype, gates.shape[-1])
    if table is None:
        return None
    values = other(states)
    result = None
    if gates.is_contiguous() and values.is_contiguous() and gates.shape == values.shape and gates.dtype is values.dtype:
        result = gated.gate(gates, values, table)
    return last(activation(gates) * values if result is None else result)  # type: ignore[no-any-return]


@functools.cache
@keep_result(bool)
def multiplies_as_torch(dtype: torch.dtype) -> bool | None:
    """Probe whether the kernel rounds products, and sums, as torch does."""
    generator, table = torch.Generator().manual_seed(0), gated.all_values(dtype)
    table = torch.cat([table, table[:1]])
    with torch.inference_mode():
        return all(
            have_equal_bits(gated.gate(gates, values, table), gates * values)
            and have_equal_bits(gated.add(gates, values), gates + values)
            for gates, values in all_pairs(dtype, generator)
        )


def all_pairs(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Make pairs of numbers whose products, and sums, show any other rounding, or treatment of values that are not normal."""
    steps, shape = 1 << (DIGITS[dtype] + 1) // 2, (4099,)
    for scale in (1.0, tiny(dtype)):
        ties = [(2 * torch.randint(-steps // 2, steps // 2, shape, generator=generator) + 1) / steps for _ in range(2)]
        spread = 2.0 ** torch.randint(-9, 5, shape, generator=generator)
        drawn = [torch.randn(shape, generator=generator) for _ in range(2)]
        for first, second in (ties, drawn, (drawn[0] * spread, drawn[1])):
            yield (scale * first).to(dtype), second.to(dtype)

"""``lingualinked.hook``: a hook that says what it wants of a call, so that nothing else travels.

Knows torch's modules and their hooks, in one process or sharded; neither workers nor steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lingualinked.errors import ArgumentError
from lingualinked.model.hooks.hook_cuts import (
    cut_tensor,
    first_input,
    first_tensor,
    put_tensor,
    read_positions,
    with_first_input,
    with_first_tensor,
)
from lingualinked.sharded.hooks.hook_calls import has_same_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.hooks import RemovableHandle

    from lingualinked.model.hooks.hook_data import Positions

Wants = Literal["input", "output", "both"]


def hook(
    module: nn.Module,
    function: Callable[..., Any],
    *,
    wants: Wants = "output",
    positions: Any = None,
) -> RemovableHandle:
    """Register a forward hook that is given only a part of a call, and replaces only that.

    On a sharded model, only that part travels to this process and back, where an ordinary hook sends all that the module was
    called with and all that it returns. On a module of an uncut model it does the same, so that one code runs on both.

    Parameters
    ----------
    module : torch.nn.Module
        A submodule of a sharded model, or any module.
    function : callable
        Called in the thread that called the model: ``function(value)``, or ``function(input, output)`` if it wants both.
        ``value`` is the module's output or input: if that is a structure, its first tensor; of the input, the first tensor in
        the order of the call. What it returns takes the place of the value, and with ``wants="both"`` of the output; None
        leaves it as it is, with what the function has changed in place.
    wants : {"output", "input", "both"}
        With "input", it is called before the module, else behind it. With "both", the input is to be read only.
    positions : int, slice, sequence of int, or None
        Tokens, in each step: ``function`` is given a copy of ``value[:, positions]``, and the module's output (or input) is
        replaced by a copy in which ``[:, positions]`` is what it returns, in the value's dtype and broadcast as in an assignment. ``None``: the tensor itself.
        For tensors ``[rows, tokens, ...]`` of three dimensions or more.

    Returns
    -------
    torch.utils.hooks.RemovableHandle
        ``remove()`` unregisters it; also a context manager.

    Raises
    ------
    ArgumentError
        If an argument is none of these. From the call of the model: if there is no tensor, no such position, or one of them occurs
        twice; if the input was changed with ``wants="both"``.

    Notes
    -----
    Hooks run in the order in which they were registered, ordinary ones among them. Only the part travels as long as all hooks
    of a module are registered by this function, and those before it, and those behind it, have the same ``positions``; also
    not for a module that runs all layers or that every stage runs, such as rotary embeddings. Otherwise all of the call
    travels, with the same effect.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"module is a {type(module).__name__}: pass a submodule, such as model.model.layers[3].mlp")
    if not callable(function):
        raise ArgumentError(f"function is a {type(function).__name__}: pass a callable")
    if wants not in ("output", "input", "both"):
        raise ArgumentError(f"wants={wants!r}: pass 'output', 'input' or 'both'")
    narrow = NarrowHook(function, wants, read_positions(positions))
    if wants == "input":
        return module.register_forward_pre_hook(narrow.call_before, with_kwargs=True)
    return module.register_forward_hook(narrow.call_behind, with_kwargs=True)


def narrow_hooks(registry: Mapping[int, Any]) -> list[NarrowHook]:
    """Return the hooks of a registry of torch's that this module's function has registered, in their order."""
    owners = [getattr(each, "__self__", None) for each in list(registry.values())]
    return [each for each in owners if isinstance(each, NarrowHook)]


class NarrowHook:
    """A function that wants a part of a module's call."""

    def __init__(self, function: Callable[..., Any], wants: Wants, positions: Positions | None) -> None:
        self._function = function
        self.wants_both = wants == "both"
        self.positions = positions

    def call_before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function before a module: a hook of torch's."""
        states = first_input(args, kwargs)
        new = self._call_with(states)
        return None if new is None else with_first_input(args, kwargs, new)

    def call_behind(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Call the function behind a module: a hook of torch's."""
        given = cut_tensor(first_input(args, kwargs), self.positions) if self.wants_both else None
        new = self._call_with(first_tensor("what the module returns", output), given)
        return None if new is None else with_first_tensor(output, new)

    def _call_with(self, states: Tensor, given: Tensor | None = None) -> Tensor | None:
        """Return what takes the place of a tensor, or None if that stays."""
        value = cut_tensor(states, self.positions)
        before = value if self.positions is None else value.clone()
        new = self.call_function(value, given)
        if new is value and (self.positions is None or has_same_bits(value, before)):
            return None
        return put_tensor(states, self.positions, new)

    def call_function(self, value: Tensor, given: Tensor | None = None) -> Tensor:
        """Return what the function makes of a value, which was cut already; given an input, it is called with that too."""
        if given is None:
            result = self._function(value)
        else:
            before = given.clone()
            result = self._function(given, value)
            if not has_same_bits(given, before):
                raise ArgumentError(
                    'a hook that wants="both" changed its input in place: register another one that wants="input"'
                )
        if result is None:
            return value
        if self.positions is None:
            if not isinstance(result, Tensor):
                raise ArgumentError(f"a hook returned a {type(result).__name__}: return a tensor, or None")
            return result
        fitted = torch.empty_like(value)
        fitted[...] = result
        return fitted

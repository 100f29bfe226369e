"""Cuts the tensor that a hook wants out of a module's call, and puts what the hook has made of it in its place.

Knows torch's tensors and structures of them; neither hooks nor where they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lingualinked.checks import as_index
from lingualinked.errors import ArgumentError
from lingualinked.model.hooks.hook_data import Positions
from lingualinked.quantities import count_text

_NO_TOKENS = "a tensor of shape {}, and positions select tokens of [rows, tokens, ...]: leave positions out"


def read_positions(given: object) -> Positions | None:
    """Return the positions that a user has given: an int, a slice, several ints, or None; raise ArgumentError for others."""
    if given is None:
        return None
    try:
        if isinstance(given, slice):
            bounds = [None if each is None else as_index(each) for each in (given.start, given.stop, given.step)]
            if bounds[2] is not None and bounds[2] <= 0:
                raise ArgumentError(f"positions={given}: the step must be positive, as for every tensor")
            return Positions("slice", tuple(bounds))
        if hasattr(given, "__index__") and not getattr(given, "ndim", 0):
            return Positions("one", (as_index(given),))
        if isinstance(given, Iterable) and not isinstance(given, str):
            return Positions("several", tuple(map(as_index, given)))
    except TypeError:
        pass
    raise ArgumentError(
        f"positions={given!r}: pass an int of at most 64 bits, a slice, a sequence of ints, or None for all tokens"
    )


def cut_tensor(states: Tensor, positions: Positions | None) -> Tensor:
    """Return a copy of some tokens of a tensor; the tensor itself if no positions are given."""
    if positions is None:
        return states
    return states[:, _index(states, positions)].clone()


def put_tensor(states: Tensor, positions: Positions | None, new: Tensor) -> Tensor:
    """Return a copy of a tensor with other values of some tokens; the new tensor if no positions are given."""
    if positions is None:
        return new
    replaced = states.clone()
    replaced[:, _index(states, positions)] = new
    return replaced


def first_tensor(what: str, value: Any) -> Tensor:
    """Return a tensor, or the first one of a tuple, list or mapping; raise ArgumentError if there is none."""
    if isinstance(value, Tensor):
        return value
    for each in _items(value).values():
        if isinstance(each, Tensor):
            return each
    raise ArgumentError(
        f"{what} is a {type(value).__name__} without tensors: use an ordinary hook, which is given all of it"
    )


def with_first_tensor(value: Any, new: Tensor) -> Any:
    """Return a structure with another first tensor."""
    if isinstance(value, Tensor):
        return new
    items = _items(value)
    items[next(key for key, each in items.items() if isinstance(each, Tensor))] = new
    if isinstance(value, Mapping):
        return type(value)(items)  # type: ignore[call-arg]
    return type(value)(*items.values()) if hasattr(value, "_fields") else type(value)(items.values())


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor that a module is called with, in the order of the call."""
    return first_tensor("what the module is called with", (*args, *kwargs.values()))


def with_first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with another first tensor."""
    replaced = with_first_tensor((*args, *kwargs.values()), new)
    return replaced[: len(args)], dict(zip(kwargs, replaced[len(args) :], strict=True))


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, tuple | list) else {}


def _index(states: Tensor, positions: Positions) -> Any:
    """Return the index of tokens, or raise ArgumentError if there are no such tokens, or one occurs twice."""
    if states.ndim < 3:
        raise ArgumentError(_NO_TOKENS.format(list(states.shape)))
    if positions.kind == "slice":
        return slice(*positions.values)
    num_tokens = states.shape[1]
    tokens = [int(each or 0) for each in positions.values]
    beyond = [each for each in tokens if not -num_tokens <= each < num_tokens]
    if beyond:
        raise ArgumentError(
            f"position {beyond[0]} of {count_text(num_tokens, 'token')}: positions are those of one step"
        )
    if len({each % num_tokens for each in tokens}) < len(tokens):
        raise ArgumentError(f"positions {tokens} of {count_text(num_tokens, 'token')} name one twice")
    return tokens[0] if positions.kind == "one" else tokens

"""What an object of transformers keeps, as tensors and plain values by their paths.

Knows attributes, dictionaries and sequences; no kinds of layers and no stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError

Path = tuple[str | int, ...]
"""Where a value is: the name of an attribute, and keys from there on."""

Plain = bool | int | float | str | None
"""A value beside tensors; a dtype by its name."""

State = dict[str, Tensor | Plain]
"""What an object keeps, by paths with dots."""

_DEVICE = "device"  # in place of one: the receiver's


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield everything that attributes, dictionaries and sequences lead to."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from walk(each, (*path, key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from walk(each, (*path, index))
    else:
        yield path, value


def tensors_of(owner: Any) -> dict[Path, Tensor]:
    """Return all tensors that an object keeps."""
    return {path: value for path, value in walk(vars(owner)) if isinstance(value, Tensor)}


def num_bytes(tensors: dict[Path, Tensor]) -> int:
    """Return the bytes that tensors keep allocated, of what they share once."""
    storages = [each.untyped_storage() for each in tensors.values()]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def rebuilt(value: Any, tensor: Any, seen: dict[int, Tensor] | None = None) -> Any:
    """Copy dictionaries and sequences, with `tensor(each)` for tensors, once for each that occurs several times."""
    seen = {} if seen is None else seen
    if isinstance(value, dict):
        return {key: rebuilt(each, tensor, seen) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rebuilt(each, tensor, seen) for each in value)
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = tensor(value)
        return seen[id(value)]
    return value


def read_state(owner: Any, left_out: Collection[str] = ()) -> State:
    """Return all that an object keeps, except for some attributes; tensors are valid until the next change.

    Raises ProtocolError for what can't be sent.
    """
    state: State = {}
    for path, value in walk({name: each for name, each in vars(owner).items() if name not in left_out}):
        name = ".".join(map(str, path))
        if isinstance(value, torch.device):
            state[name] = _DEVICE
        elif isinstance(value, torch.dtype):
            state[name] = str(value)
        elif value is None or isinstance(value, bool | int | float | Tensor):
            state[name] = value
        else:
            raise ProtocolError(
                f"a {type(owner).__name__} keeps a {type(value).__name__} at {name}, which can't be sent"
            )
    return state


def write_state(owner: Any, state: Mapping[str, Tensor | Plain], device: torch.device) -> None:
    """Replace what an object keeps by what another one of its class has kept, with copies of tensors on a device.

    Raises ProtocolError if its class keeps nothing there.
    """
    copies: dict[int, Tensor] = {}
    for name, value in state.items():
        place, key = _place(owner, name)
        held = place.get(key) if isinstance(place, dict) else place[key]
        if isinstance(held, bool | int | float) and type(value) is not type(held):
            raise ProtocolError(f"a {type(owner).__name__} keeps a {type(held).__name__} at {name}, not {value!r:.100}")
        if isinstance(value, Tensor):
            copies.setdefault(id(value), value.to(device, copy=True))
            place[key] = copies[id(value)]
        elif isinstance(value, str):
            place[key] = device if value == _DEVICE else dtype_of(value)
        else:
            place[key] = value


def _place(owner: Any, name: str) -> tuple[Any, str | int]:
    """Return the container of a place, and the key in it; raise ProtocolError if there is none."""
    *parents, last = name.split(".")
    place: Any = vars(owner)
    try:
        for part in parents:
            place = place[_key(place, part)]
        if place is vars(owner) and last.removeprefix("indexer_") in ("dtype", "device"):  # set with the first tokens
            return place, last
        key = _key(place, last)
        place[key]
    except (LookupError, TypeError, ValueError):
        raise ProtocolError(f"a {type(owner).__name__} keeps nothing at {name}") from None
    return place, key


def _key(place: Any, part: str) -> str | int:
    return part if isinstance(place, dict) and part in place else int(part)


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype with a name; raise ProtocolError if there is none."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ProtocolError(f"{name!r} is not a dtype")
    return dtype


def set_at(owner: Any, path: Path, value: Any) -> None:
    """Replace the value at a path."""
    place: Any = vars(owner)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value


def on_meta(owner: Any) -> Any:
    """Return an object of the same class with tensors of the same shapes on the meta device, which no change reaches."""
    twin: Any = object.__new__(type(owner))
    held = rebuilt(vars(owner), lambda each: torch.empty_like(each, device="meta"))
    devices = {name: torch.device("meta") for name, value in held.items() if isinstance(value, torch.device)}
    vars(twin).update(held | devices)
    return twin

"""What `ShardedModel.capture` has collected: the tensors of each module, step by step, and which devices made them.

Knows values as they arrive; neither stages nor sessions.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

from lingualinked.errors import ArgumentError
from lingualinked.quantities import bytes_text

if TYPE_CHECKING:
    from torch import Tensor

    from lingualinked.cluster.steps.captured import CapturedValue


class CapturedTensors(Sequence["Tensor"]):
    """The tensors that were captured at one module, in the order in which they arrived: one for each call of it.

    Attributes
    ----------
    devices : tuple of str
        The device that made each of them.
    sessions : tuple of int
        A number for each of them that is the same for the steps of one text: those of several threads may alternate.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._values: list[CapturedValue] = []

    @property
    def devices(self) -> tuple[str, ...]:  # noqa: D102 - an attribute of the class
        return tuple(value.device for value in self._values)

    @property
    def sessions(self) -> tuple[int, ...]:  # noqa: D102 - an attribute of the class
        return tuple(value.session for value in self._values)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        if isinstance(index, slice):
            return tuple(value.tensor for value in self._values[index])
        return self._values[index].tensor

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<{self._path}: {[list(tensor.shape) for tensor in self]}>"

    def cat(self) -> Tensor:
        """Concatenate the tensors of all steps along the positions, their second dimension.

        Returns
        -------
        Tensor
            ``[rows, positions of all steps, ...]``.

        Raises
        ------
        ArgumentError
            If nothing was captured, or the tensors differ in another dimension: then they are of several calls.
        """
        import torch

        if not self._values:
            raise ArgumentError(f"nothing was captured at {self._path}: no step ran that has the rows and positions")
        shapes = [list(tensor.shape) for tensor in self]
        if any(len(shape) < 2 or shape[:1] + shape[2:] != shapes[0][:1] + shapes[0][2:] for shape in shapes):
            raise ArgumentError(
                f"what was captured at {self._path} has the shapes {shapes}, which can't be joined: choose some of them"
            )
        return torch.cat(list(self), 1)


class Captured(Mapping[str, CapturedTensors]):
    """What `ShardedModel.capture` has collected: for each module that it matched, by its path, the tensors of all steps.

    It stays as it is after the ``with`` block. A path that was not captured raises `ArgumentError`.

    Attributes
    ----------
    num_bytes : int
        Bytes of all tensors that are held.
    """

    def __init__(self, paths: Sequence[str], max_bytes: int) -> None:
        self._tensors = {path: CapturedTensors(path) for path in paths}
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._untrusted: set[str] = set()
        self._lock = threading.Lock()

    __eq__, __hash__ = object.__eq__, object.__hash__  # of its own: a mapping compares its tensors

    def __getitem__(self, path: str) -> CapturedTensors:
        if path not in self._tensors:
            near = difflib.get_close_matches(str(path), self._tensors, 5, 0.0)
            raise ArgumentError(f"{path!r} was not captured: {', '.join(near)} are among what was")
        return self._tensors[path]

    def __contains__(self, path: object) -> bool:
        return path in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        held = f"{len(self)} modules, {bytes_text(self.num_bytes)}"
        return f"<Captured: {held}, untrusted: {', '.join(sorted(self.untrusted)) or 'none'}>"

    @property
    def devices(self) -> dict[str, tuple[str, ...]]:
        """The devices that made the tensors of each module: several if layers have moved."""
        return {path: tuple(dict.fromkeys(each.devices)) for path, each in self._tensors.items()}

    @property
    def untrusted(self) -> frozenset[str]:
        """The modules that were captured on a device that is not marked ``trusted``, where some devices are.

        Such a device can send anything of the right shape and dtype. The value of a trusted device is computed correctly,
        from what the stages before it have sent.
        """
        with self._lock:
            return frozenset(self._untrusted)

    def clear(self) -> None:
        """Drop the tensors that were collected so far, for example once they are added to a running mean."""
        with self._lock:
            self._untrusted.clear()
            for each in self._tensors.values():
                each._values = []  # noqa: SLF001 - its own
            self.num_bytes = 0

    def check_room(self, num_bytes: int) -> None:
        """Raise ArgumentError if so many bytes more would exceed what may be held."""
        held = self.num_bytes
        if held + num_bytes > self._max_bytes:
            raise ArgumentError(
                f"a capture holds {bytes_text(held)}, and this step would add {bytes_text(num_bytes)}, which exceeds "
                f"max_bytes={bytes_text(self._max_bytes)}: choose positions=, reduce=, dtype= or fewer modules, call clear() on "
                "what was captured, or raise max_bytes="
            )

    def add(self, path: str, value: CapturedValue, *, is_trusted: bool) -> None:
        """Add what was captured in a step."""
        with self._lock:
            self._tensors[path]._values.append(value)  # noqa: SLF001 - its own
            self.num_bytes += value.tensor.nbytes
            if not is_trusted:
                self._untrusted.add(path)

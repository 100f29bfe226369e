"""What `ShardedModel.intervene` does to the values of a module, as plain data: tensors, numbers, and which values.

Knows no model; imports torch only to check the tensors that it is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lingualinked.checks import as_float, is_real
from lingualinked.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

Chosen = Any
"""An int, a slice, a sequence of ints, or None, as in `ShardedModel.capture`."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Intervention:
    """Which values are meant; the base class of all interventions."""

    positions: Chosen = dataclasses.field(default=None, kw_only=True)
    rows: Chosen = dataclasses.field(default=None, kw_only=True)
    steps: Literal["all", "prefill", "decode"] = dataclasses.field(default="all", kw_only=True)
    what: Literal["output", "input"] = dataclasses.field(default="output", kw_only=True)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Add(Intervention):
    """Add a vector: ``values + vector.to(values)``.

    Parameters
    ----------
    vector : Tensor
        Real numbers, of a shape that broadcasts to the values: ``[hidden]``, ``[positions, hidden]``, or
        ``[rows, positions, hidden]``.
    positions, rows, steps, what
        Which values, as in `ShardedModel.capture`.

    Raises
    ------
    ArgumentError
        If it is not a tensor of real numbers.

    Examples
    --------
    >>> with model.intervene({"model.layers.5": ll.Add(4.0 * steering, positions=-1)}):
    ...     model.generate(ids)
    """

    vector: Tensor

    def __post_init__(self) -> None:
        check_tensor("vector", self.vector)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Replace(Intervention):
    """Put other values in their place: ``value.to(values).expand_as(values)``, as in activation patching.

    Parameters
    ----------
    value : Tensor
        Real numbers, of a shape that broadcasts to the values.
    positions, rows, steps, what
        Which values, as in `ShardedModel.capture`.

    Raises
    ------
    ArgumentError
        If it is not a tensor of real numbers.
    """

    value: Tensor

    def __post_init__(self) -> None:
        check_tensor("value", self.value)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Scale(Intervention):
    """Multiply by a factor: ``values * factor``; of a tensor, ``values * factor.to(values)``.

    Parameters
    ----------
    factor : float or Tensor
        A number; or real numbers of a shape that broadcasts to the values, such as one for each neuron.
    positions, rows, steps, what
        Which values, as in `ShardedModel.capture`.

    Raises
    ------
    ArgumentError
        If it is neither.
    """

    factor: float | Tensor

    def __post_init__(self) -> None:
        if not _is_float(self.factor):
            check_tensor("factor", self.factor, "a number that a float holds, or ")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Ablate(Intervention):
    """Put zeros in their place, or a mean that was measured before: ``mean.to(values).expand_as(values)``.

    Parameters
    ----------
    mean : Tensor or None
        Real numbers, of a shape that broadcasts to the values; ``None``: zeros.
    positions, rows, steps, what
        Which values, as in `ShardedModel.capture`.

    Raises
    ------
    ArgumentError
        If it is not a tensor of real numbers.
    """

    mean: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mean is not None:
            check_tensor("mean", self.mean)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Project(Intervention):
    """Remove the part that lies in the space of some directions, or keep that part alone.

    The part is ``part = ((values.to(basis.dtype) @ basis) @ basis.T).to(values.dtype)``, where ``basis`` is that of this object.
    What remains is ``values - part``, or ``part``.

    Parameters
    ----------
    directions : Tensor
        ``[hidden]``, or ``[directions, hidden]``; floating-point, finite and linearly independent. Their lengths don't count.
    mode : {"remove", "keep"}
        What to do with the part.
    positions, rows, steps, what
        Which values, as in `ShardedModel.capture`.

    Raises
    ------
    ArgumentError
        If the directions are not independent, or the mode is unknown.

    References
    ----------
    Ravfogel et al., "Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection", ACL 2020.
    """

    directions: Tensor
    mode: Literal["remove", "keep"] = "remove"

    def __post_init__(self) -> None:
        check_tensor("directions", self.directions)
        if self.mode not in ("remove", "keep"):
            raise ArgumentError(f"mode={self.mode!r} must be 'remove' or 'keep'")
        _ = self.basis

    @property
    def basis(self) -> Tensor:
        """An orthonormal basis of the directions' space, ``[hidden, directions]``, in float32, or float64 if they are.

        It is ``torch.linalg.qr(directions.T).Q.contiguous()``, of the directions in that dtype and of length 1.
        """
        import torch

        directions = self.directions.detach()
        wide = directions.to(torch.float64 if directions.dtype is torch.float64 else torch.float32)
        rows = wide[None] if wide.ndim == 1 else wide
        if rows.ndim == 2 and rows.isfinite().all():
            unit = rows / rows.norm(dim=1, keepdim=True)
            if unit.isfinite().all() and int(torch.linalg.matrix_rank(unit)) == len(rows) > 0:
                basis: Tensor = torch.linalg.qr(
                    unit.T
                ).Q.contiguous()  # in which order it lies, decides how products are summed
                return basis
        raise ArgumentError(
            f"directions of shape {list(directions.shape)} must be [hidden] or [directions, hidden], finite and linearly independent"
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Clamp(Intervention):
    """Keep values between two bounds: each by itself, ``values.clamp(low, high)``; or their length along a direction.

    With a direction, ``unit = direction / direction.norm()`` in float32 (float64 if it is), ``along = values.to(unit.dtype) @ unit``,
    and the result is ``values + ((along.clamp(low, high) - along)[..., None] * unit).to(values.dtype)``.

    Parameters
    ----------
    low, high : float or None
        The bounds; ``None``: there is none on this side.
    direction : Tensor or None
        ``[hidden]``, finite and not zero; ``None``: each value by itself.
    positions, rows, steps, what
        Which values, as in `ShardedModel.capture`.

    Raises
    ------
    ArgumentError
        If there is no bound, they are not in order, or the direction has no length.
    """

    low: float | None = None
    high: float | None = None
    direction: Tensor | None = None

    def __post_init__(self) -> None:
        bounds: Sequence[Any] = [bound for bound in (self.low, self.high) if bound is not None]
        if not bounds or not all(map(_is_float, bounds)) or not bounds[0] <= bounds[-1]:
            raise ArgumentError(
                f"low={self.low!r} and high={self.high!r} must be numbers that floats hold, in order; one may be None"
            )
        if self.direction is not None:
            check_tensor("direction", self.direction)
            if self.direction.ndim != 1 or not self.unit.isfinite().all():  # type: ignore[union-attr]
                raise ArgumentError(
                    f"direction of shape {list(self.direction.shape)} must be [hidden], finite and not zero"
                )

    @property
    def unit(self) -> Tensor | None:
        """The direction with length 1, in float32, or float64 if it is; None without one."""
        if self.direction is None:
            return None
        import torch

        direction = self.direction.detach()
        wide = direction.to(torch.float64 if direction.dtype is torch.float64 else torch.float32)
        unit: Tensor = wide / wide.norm()
        return unit


def _is_float(value: object) -> bool:
    """Return whether a value is a real number, NumPy's included, that is not an integer beyond all floats."""
    return is_real(value) and (not isinstance(value, int) or math.isfinite(as_float(value, "")))


def check_tensor(name: str, value: object, alternative: str = "") -> None:
    """Raise ArgumentError unless a value is a dense tensor of real numbers that holds data."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{name} of type {type(value).__name__} must be {alternative}a tensor")
    if value.is_meta:
        raise ArgumentError(f"{name} of {value.dtype} {list(value.shape)} is on the meta device, which holds no data")
    if value.is_complex() or value.layout is not torch.strided or not value.numel():
        raise ArgumentError(f"{name} of {value.dtype} {list(value.shape)} must be a dense tensor of real numbers")

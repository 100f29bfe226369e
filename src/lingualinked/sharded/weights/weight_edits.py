"""Edits of a sharded model's weights: statements that change a tensor in place, and `edit`, which can be undone.

Knows tensors and which changes of them are in force; neither workers nor modules.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor

from lingualinked.cluster.weights.tensor_edits import Change, Changes
from lingualinked.errors import ArgumentError, ClosedError
from lingualinked.interrupts import interruptible
from lingualinked.model.weights.held_tensors import sum_of_products
from lingualinked.protocol.editing import ChangeKind
from lingualinked.sharded.weights.fetched_weights import FetchedWeights
from lingualinked.sharded.weights.remote_tensor import RemoteTensor

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.cutting.model_parts import ModelParts

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightEdit:
    """An edit of a weight that is in force until it is undone; as a context manager, until the end of its block.

    Undoing it leaves the tensor as the other edits in force make it, from the bits that were loaded. ``name`` is the tensor's
    name in the model.
    """

    def __init__(self, editor: WeightEditor, name: str, change: Change) -> None:
        self._editor = editor
        self._change = change
        self.name = name

    @property
    def is_in_force(self) -> bool:
        """Whether it has not been undone."""
        return self._change in self._editor.in_force(self.name)

    def undo(self) -> None:
        """Undo the edit; does nothing if it is not in force.

        Raises
        ------
        ClosedError, WorkerError, WorkerDiedError, StepTimeoutError
            If a worker that holds the tensor can't be told; the edit is then in force, if the model still runs.
        """
        self._editor.remove(self.name, self._change)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "" if self.is_in_force else ", undone"
        return f"<{type(self).__name__} of {self.name}: {self._change.kind.name.lower()}{state}>"


class WeightEditor:
    """Edits the weights of one model."""

    def __init__(self, pipeline: Pipeline, parts: ModelParts, tied: Mapping[str, str]) -> None:
        self._edits = pipeline.edits
        self._parts = parts
        self._aliases = _aliases(tied)
        self._weights: weakref.ref[FetchedWeights]  # which refer to this

    def serve(self, weights: FetchedWeights) -> None:
        """Change what has been fetched as well."""
        self._weights = weakref.ref(weights)

    def in_force(self, name: str) -> Changes:
        """Return the changes of a tensor that are in force, in order."""
        return self._edits.in_force(name)

    def list_edits(self) -> tuple[WeightEdit, ...]:
        """Return all edits in force: of each tensor in order."""
        return tuple(WeightEdit(self, name, change) for name, change in self._edits.list_changes())

    @interruptible
    def edit(self, wholes: Mapping[str, Tensor], change: Callable[[Mapping[str, Tensor]], Any]) -> Any:
        """Call ``change`` with copies of fetched tensors, by name; send the workers what it has changed in them."""
        with self._between_steps() as weights:
            copies = {name: whole.clone() for name, whole in wholes.items()}
            result = change(copies)
            changed = {}
            for name, whole in wholes.items():
                span = _changed_span(whole, copies[name])
                if span is not None:
                    changed[name] = self._with_statement(name, copies[name], *span)
            if changed:
                self._edits.replace(self._parts, changed, self._aliases)
            for name in changed:
                weights.rewrite(name, copies[name])
        return result

    @interruptible
    def add(self, name: str, kind: ChangeKind, tensors: tuple[Tensor, ...]) -> WeightEdit:
        """Put one more change of a tensor in force."""
        with self._between_steps() as weights:
            change = Change(self._edits.new_number(), kind, tuple(map(_snapshot, tensors)))
            self._replace(name, (*self.in_force(name), change), weights)
        return WeightEdit(self, name, change)

    @interruptible
    def remove(self, name: str, change: Change) -> None:
        """Take a change out of force."""
        with self._between_steps() as weights:
            if change in self.in_force(name):
                self._replace(name, tuple(each for each in self.in_force(name) if each is not change), weights)

    def _replace(self, name: str, changes: Changes, weights: FetchedWeights) -> None:
        self._edits.replace(self._parts, {name: changes}, self._aliases)
        weights.renew(name)

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[FetchedWeights]:
        weights = self._weights()
        if weights is None:
            raise ClosedError("the model of this weight is closed: load it again with from_pretrained")
        weights.check_open()
        with self._edits.between_steps(), weights.unread():
            yield weights

    def _with_statement(self, name: str, value: Tensor, first: int, end: int) -> Changes:
        """Return the changes of a tensor with that of a statement; it is joined with that of the statement before it."""
        others = self.in_force(name)
        last = others[-1] if others else None
        if last is not None and last.is_statement:
            others = others[:-1]
            first, end = min(first, last.first), max(end, last.first + last.tensors[0].numel())
        values = _snapshot(value.view(-1)[first:end])
        return (*others, Change(self._edits.new_number(), ChangeKind.SET, (values,), first, is_statement=True))


def edit(
    parameter: Tensor,
    *,
    add: Tensor | tuple[Tensor, Tensor] | None = None,
    set: Tensor | None = None,  # noqa: A002 - it is what is said of it
) -> WeightEdit:
    """Edit a weight of a sharded model where it lies, until the edit is undone.

    Statements that change a parameter in place, such as ``parameter.mul_(2)`` under ``torch.no_grad()``, edit it as well;
    this sends factors instead of what they make, and can be undone: ``model.edits`` lists what is in force.

    Parameters
    ----------
    parameter : Tensor
        A parameter or buffer of a sharded model, such as ``model.model.layers[2].mlp.down_proj.weight``.
    add : Tensor or (Tensor, Tensor)
        What to add, as ``parameter.add_(add)`` does; or two factors: vectors ``u`` and ``v`` for
        ``parameter.add_(torch.outer(u, v))``, or matrices for ``parameter.add_(u @ v.T)``, with the same bits.
    set : Tensor
        What to set it to, of its shape and dtype.

    Returns
    -------
    WeightEdit
        With ``undo()``; a context manager that undoes it at its end.

    Raises
    ------
    ArgumentError
        If it is no tensor of a sharded model, or what is to be added or set does not fit it.
    ClosedError, WorkerError, DeviceMemoryError, WorkerDiedError, StepTimeoutError
        If a worker that holds the tensor could not edit it; it is then as before on all of them.

    Notes
    -----
    A worker keeps an edited tensor as it was loaded beside the edited one, and the caller keeps what was added or set, for
    workers that layers move to. KV that sessions already hold is not computed anew (`StaleKVWarning`).

    Examples
    --------
    >>> with edit(model.model.layers[2].mlp.down_proj.weight, add=(u, v)):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    if not isinstance(parameter, RemoteTensor):
        raise ArgumentError(
            f"edit({type(parameter).__name__}) is for parameters and buffers of a sharded model: others are changed in place"
        )
    editor = cast("WeightEditor", parameter.remote_editor)
    if (add is None) == (set is None):
        raise ArgumentError(f"edit({parameter.remote_name}) needs add= or set=, and not both")
    given = cast("tuple[Tensor, ...]", add if isinstance(add, tuple) else (set if add is None else add,))
    if not all(isinstance(each, Tensor) for each in given) or (isinstance(add, tuple) and len(given) != 2):
        raise ArgumentError(f"edit({parameter.remote_name}): add= must be a tensor or two factors, and set= a tensor")
    kind = ChangeKind.SET if add is None else ChangeKind.ADD if len(given) == 1 else ChangeKind.ADD_PRODUCT
    _check_fit(parameter, kind, given)
    return editor.add(parameter.remote_name, kind, given)


def _check_fit(parameter: RemoteTensor, kind: ChangeKind, given: tuple[Tensor, ...]) -> None:
    """Raise ArgumentError unless a change can be made: by making it without data."""
    like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    meta = [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in given]
    try:
        if any(each.is_meta or each.layout is not torch.strided for each in given):
            raise RuntimeError("a tensor on the meta device holds no data, and a sparse one has to be made dense")
        if not all(torch.can_cast(each.dtype, like.dtype) for each in given):
            raise RuntimeError("its dtype can't hold the sum")
        if kind is ChangeKind.SET:
            if meta[0].dtype != like.dtype or meta[0].shape != like.shape:
                raise RuntimeError("it is to be set to another shape or dtype")
        else:
            like.add_(meta[0] if kind is ChangeKind.ADD else sum_of_products(*meta))
    except RuntimeError as error:
        shapes = " and ".join(f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in given)
        raise ArgumentError(
            f"edit({parameter.remote_name}), {str(parameter.dtype).removeprefix('torch.')} {list(parameter.shape)}, by {shapes}: {error}"
        ) from error


def _snapshot(tensor: Tensor) -> Tensor:
    """Return a copy that nobody else can change, contiguous, on the CPU."""
    with torch.no_grad():
        return torch.clone(tensor.detach(), memory_format=torch.contiguous_format).cpu()


def _changed_span(before: Tensor, after: Tensor) -> tuple[int, int] | None:
    """Return the first and the last element whose bits differ, as a half-open span of a flat tensor; None if none do."""
    flat = [each.view(-1) for each in (before, after)]
    if before.dtype.itemsize in _INTEGERS:
        flat = [each.view(_INTEGERS[before.dtype.itemsize]) for each in flat]
    differs = (flat[0] != flat[1]).view(torch.uint8)
    if not differs.any():
        return None
    return int(differs.argmax()), len(differs) - int(differs.flip(0).argmax())


def _aliases(tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return all names of each tied parameter, by each of them."""
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    return {name: tuple(group) for group in groups.values() for name in group}

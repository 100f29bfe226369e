"""The captures and interventions that are in force for the calls of a model: those of open ``with`` blocks, in their order.

Knows blocks and what a step has; neither the messages' way nor the arithmetic.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from lingualinked.cluster.steps.captured import CapturedValue, ExpectedValue
from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.model.hooks.instrument_data import Capture, Change, Instrument, Instruments
from lingualinked.quantities import count_text
from lingualinked.sharded.instruments.module_calls import find_calls
from lingualinked.sharded.instruments.step_shapes import check_change_in_step, count_chosen, due_shape

if TYPE_CHECKING:
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.model.spec import ModelSpec
    from lingualinked.sharded.instruments.captured import Captured
    from lingualinked.sharded.instruments.module_calls import ModuleCall, ModuleCalls

Result = TypeVar("Result")


class ListedPositions:
    """The single positions of a text that are chosen in a block, and were in none of its steps yet."""

    def __init__(self, items: Sequence[Instrument]) -> None:
        self._lock = threading.Lock()
        self._num_steps = 0
        listed = [(item, {each for some in item.positions.lists for each in some if each >= 0}) for item in items]
        self._left = [(item, positions) for item, positions in listed if positions]

    def count_step(self, past: int, num_new: int) -> None:
        """Count the positions that are in a step."""
        if self._left:
            with self._lock:
                self._num_steps += 1
                for item, positions in self._left:
                    if item.runs_in(past):
                        positions.difference_update(range(past, past + num_new))

    def check_reached(self) -> None:
        """Raise ArgumentError if some were in none of the steps."""
        for item, positions in self._left:
            if positions and self._num_steps:
                raise ArgumentError(
                    f"positions={sorted(positions)} at {item.path} were in no step of the block "
                    f"({count_text(self._num_steps, 'step')}, steps={item.steps!r}): the texts were shorter, or began before it"
                )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One open ``with`` block: its instruments, the tensors that they name, and for whose calls they are."""

    items: tuple[Instrument, ...]
    tensors: tuple[Tensor, ...]
    captured: Captured | None  # for what it captures
    shown: Mapping[str, str]  # the names of what it captures, by the paths that stages know
    listed: ListedPositions
    thread: int | None  # None: of all threads
    cache: object  # None: of all sessions
    learning: str = ""  # the first of its interventions whose tensors require gradients

    def is_for(self, cache: object) -> bool:
        """Return whether it is in force in a call of this thread with a KV cache."""
        is_own_session = self.cache is None or self.cache is cache
        return is_own_session and self.thread in (None, threading.get_ident())


class OpenBlocks:
    """The open blocks of a model, in the order in which they were entered; false if there is none."""

    def __init__(self, parts: ModelParts) -> None:
        self._parts = parts
        self._lock = threading.RLock()  # a block may be dropped, and leave, wherever memory is collected
        self._blocks: tuple[Block, ...] = ()
        self._known: dict[tuple[tuple[Block, ...], bool], InForce] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def enter(self, block: Block) -> None:
        """Put a block in force, behind the others."""
        with self._lock:
            self._blocks += (block,)

    def leave(self, block: Block) -> None:
        """End a block."""
        with self._lock:
            self._blocks = tuple(each for each in self._blocks if each is not block)
            self._known = {key: known for key, known in self._known.items() if block not in key[0]}

    def in_force(self, cache: object, spec: ModelSpec, *, takes_embeddings: bool) -> InForce | None:
        """Return what is in force in a call of this thread with a KV cache, the same object while that is the same.

        A step that ``takes_embeddings`` in place of ids calls other modules.
        """
        blocks = tuple(block for block in self._blocks if block.is_for(cache))
        _check_gradients(blocks)
        if not blocks:
            return None
        known = self._known.get((blocks, takes_embeddings))
        if known is None:
            known = InForce(blocks, self._parts, find_calls(spec, takes_embeddings=takes_embeddings))
            with self._lock:
                if all(block in self._blocks for block in blocks):
                    self._known[blocks, takes_embeddings] = known
        return known


class InstrumentBlock(Generic[Result]):
    """A ``with`` block during which captures or interventions are in force."""

    def __init__(self, blocks: OpenBlocks, make: Callable[[], Block], result: Result) -> None:
        self._block: Block | None = None
        self._blocks, self._make, self._result = blocks, make, result

    def __del__(self) -> None:
        if self._block is not None:  # nothing could end it any more, as nothing else refers to this object
            self._blocks.leave(self._block)
            warnings.warn(
                "a block of capture() or intervene() was dropped before its end, and is in force no longer: enter it by `with`, or "
                "by ExitStack.enter_context()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __enter__(self) -> Result:
        if self._block is not None:
            raise ArgumentError("this block is open already: call capture() or intervene() for each block")
        block = self._make()
        self._blocks.enter(block)
        self._block = block
        return self._result

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        block, self._block = self._block, None
        if block is not None:
            self._blocks.leave(block)
            if error is None:
                block.listed.check_reached()


@dataclasses.dataclass(frozen=True, slots=True)
class _PlannedStep:
    """What is due in steps of one kind: the next step is mostly of the same."""

    key: object
    due: dict[int, ExpectedValue] = dataclasses.field(default_factory=dict)
    num_bytes: dict[Captured, int] = dataclasses.field(default_factory=dict)


class InForce:
    """The instruments of some blocks; see `lingualinked.cluster.steps.captured.StepInstruments`."""

    def __init__(self, blocks: Sequence[Block], parts: ModelParts, calls: ModuleCalls) -> None:
        items: list[Instrument] = []
        tensors: list[Tensor] = []
        self._blocks = blocks
        self._captures: list[tuple[int, Capture, ModuleCall, int, Captured]] = []
        self._targets: dict[int, tuple[str, Captured]] = {}  # the name and the mapping of each capture
        self._changes: list[tuple[Change, ModuleCall, tuple[Tensor, ...]]] = []
        for block in blocks:
            for item in block.items:
                call = calls.get((item.path, item.side))  # None: not called in such a step
                if isinstance(item, Change):
                    own = tuple(block.tensors[index] for index in item.tensors)
                    if call is not None:
                        self._changes.append((item, call, own))
                    items.append(_renumbered(item, len(tensors)))
                    continue
                if block.captured is not None and call is not None:
                    layer = parts.layer_beside(item.path, at_end=item.side == "output")
                    self._captures.append((len(items), item, call, layer, block.captured))
                    self._targets[len(items)] = block.shown[item.path], block.captured
                items.append(item)
            tensors += block.tensors
        self._choices = {_choice_of(item): item for item in reversed(items)}  # with the first item of each
        self._planned = _PlannedStep(None)
        self.given = Instruments(tuple(items), len(tensors))
        self.tensors = tuple(tensors)

    def due_captures(self, num_rows: int, num_new: int, past: int) -> Mapping[int, ExpectedValue]:
        """Return what is captured in a step, by number; raise ArgumentError if something can't be done in it."""
        sizes = tuple(
            count_chosen(item, num_rows, num_new, past) if item.runs_in(past) else None
            for item in self._choices.values()
        )
        planned = self._planned
        if planned.key != (num_rows, num_new, sizes):
            planned = self._planned = self._plan_step(num_rows, num_new, sizes)
        for captured, num_bytes in planned.num_bytes.items():
            captured.check_room(num_bytes)
        for block in self._blocks:
            block.listed.count_step(past, num_new)
        return planned.due

    def _plan_step(self, num_rows: int, num_new: int, sizes: tuple[tuple[int, int] | None, ...]) -> _PlannedStep:
        chosen = dict(zip(self._choices, sizes, strict=True))
        for change, call, own in self._changes:
            meant = chosen[_choice_of(change)]
            if meant is not None:
                check_change_in_step(change, own, call, meant)
        planned = _PlannedStep((num_rows, num_new, sizes))
        for number, capture, call, layer, captured in self._captures:
            meant = chosen[_choice_of(capture)]
            shape = () if meant is None else due_shape(capture, call, num_rows, num_new, meant)
            if shape == ():
                continue
            value = planned.due[number] = ExpectedValue(
                path=capture.path,
                layer=layer,
                dtype=None if capture.dtype is None else getattr(torch, capture.dtype),
                is_floating_point=call.is_floating_point or capture.dtype is not None,
                shape=shape,
                is_called_once=call.has_tokens and call.num_calls == 1,
            )
            planned.num_bytes[captured] = planned.num_bytes.get(captured, 0) + _num_bytes(value)
        return planned

    def collect(self, values: list[CapturedValue], trusted: frozenset[str]) -> None:
        """Keep what was captured in a step."""
        for value in values:
            path, captured = self._targets[value.number]
            captured.add(path, value, is_trusted=not trusted or value.device in trusted)


def _check_gradients(blocks: Sequence[Block]) -> None:
    """Raise UnsupportedOperationError if tensors of an intervention are to learn from a step that may have gradients."""
    for block in blocks:
        if block.learning and torch.is_grad_enabled():
            raise UnsupportedOperationError(
                f"{block.learning} has a tensor that requires gradients, which do not flow to interventions: detach() it, call the "
                "model under torch.no_grad(), or do the same in a forward hook, to whose tensors they flow"
            )


def _choice_of(item: Instrument) -> object:
    return item.rows, item.positions, item.steps


def _renumbered(item: Change, first: int) -> Change:
    return Change(
        path=item.path,
        side=item.side,
        rows=item.rows,
        positions=item.positions,
        steps=item.steps,
        kind=item.kind,
        tensors=tuple(first + index for index in item.tensors),
        numbers=item.numbers,
    )


def _num_bytes(due: ExpectedValue) -> int:
    num_bytes = 4 if due.dtype is None else due.dtype.itemsize
    for size in due.shape or (0,):
        num_bytes *= 1 if size is None else size
    return num_bytes

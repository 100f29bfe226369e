"""A batch that runs as several sessions, its microbatches, whose steps follow each other through the stages.

Knows which rows each has; neither generation nor why the batch is split.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from lingualinked.cluster.runs.joined_run import JoinedRun
from lingualinked.cluster.runs.run_in_flight import RunInFlight
from lingualinked.cluster.runs.run_request import rows_of, rows_of_positions
from lingualinked.cluster.sessions.joined_rows import join_rows
from lingualinked.cluster.sessions.session_group import SessionGroup
from lingualinked.cluster.sessions.stepped_session import PLAIN
from lingualinked.cluster.steps.step_in_flight import StepInFlight, StepOptions
from lingualinked.errors import KVCapacityError

if TYPE_CHECKING:
    from lingualinked.cluster.kv.kv_budget import KVBudget
    from lingualinked.cluster.sessions.session import Session
    from lingualinked.cluster.steps.recorded import Recorded
    from lingualinked.model.adapters.adapter_data import AdapterUse


class SplitSession(SessionGroup):
    """A session of several microbatches, with the face of a `Session`: ``microbatches``, and ``sizes``, the rows of each, in order.

    What needs all rows together, such as hooks and orders of rows across microbatches, makes one session of them, which it
    then stays: `microbatches` has one element. So does an order that leaves a microbatch fewer than ``least_rows`` rows.
    """

    def __init__(
        self, sizes: Sequence[int], least_rows: int, open_session: Callable[[int | None], Session], budget: KVBudget
    ) -> None:
        self.sizes = tuple(sizes)
        self.least_rows = least_rows
        self.microbatches = [open_session(index) for index in range(len(sizes))]
        self._open_session = open_session
        self._budget = budget

    @property
    def members(self) -> Sequence[Session]:
        """Its microbatches."""
        return self.microbatches

    @property
    def num_microbatches(self) -> int:
        """Microbatches that its rows run as."""
        return len(self.microbatches)

    @property
    def num_rows(self) -> int:
        """Rows whose KV is held."""
        return sum(each.num_rows for each in self.microbatches)

    @property
    def num_tokens(self) -> int:
        """Tokens of each row whose KV is held."""
        return self.microbatches[0].num_tokens

    @property
    def kv_has_gradients(self) -> bool:
        """Whether tokens of its KV were computed in steps with gradients."""
        return any(each.kv_has_gradients for each in self.microbatches)

    @property
    def stepping_thread(self) -> int | None:
        """The thread that runs the hooks of a step now."""
        return self.microbatches[0].stepping_thread

    def start_step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions = PLAIN,
    ) -> StepInFlight | SplitStep | JoinedRun:
        """Send a step of each microbatch, as `Session.start_step` does."""
        needs_all = options.hooks is not None or options.instruments is not None or options.gradients is not None
        needs_all |= options.extras is not None and bool(options.extras.for_first)  # pictures are not of rows
        if needs_all or len(inputs) != sum(self.sizes):
            self.join()
        if len(self.microbatches) == 1:
            return self.microbatches[0].start_step(inputs, attention_mask, position_ids, logits_to_keep, options)
        # 1) count the KV of all microbatches, or of none
        run = options.run
        if options.keeps_kv:
            most_steps = 1 if run is None else run.num_steps
            num_steps = self._hold_kv(inputs.shape[1] + options.num_tokens_ahead, most_steps)
            run = run and dataclasses.replace(run, num_steps=num_steps)
        # 2) send their steps
        flights: list[StepInFlight] = []
        try:
            for microbatch, rows in zip(self.microbatches, self._slices(), strict=True):
                mask, positions = rows_of(attention_mask, rows), rows_of_positions(position_ids, rows)
                own_run = run and run.of_rows(rows.start, rows.stop)
                own = dataclasses.replace(
                    options,
                    adapters=_adapters_of(options.adapters, rows),
                    run=own_run,
                    extras=options.extras and options.extras.of_rows(rows, len(inputs)),
                )
                flights.append(microbatch.start_step(inputs[rows], mask, positions, logits_to_keep, own))
        except BaseException as error:
            if flights or not isinstance(error, KVCapacityError):
                self.end()
            raise
        is_run = any(isinstance(flight, RunInFlight) for flight in flights)
        return JoinedRun(flights, self.sizes, self.end) if is_run else SplitStep(self, flights)

    def _hold_kv(self, num_new: int, most_steps: int) -> int:
        """Count the KV of all microbatches for a step and those behind it in a run; return for how many steps there is room."""
        numbers = [each._number for each in self.microbatches]  # noqa: SLF001 - within the room
        for num_steps in sorted({1, most_steps}, reverse=True):
            num_tokens = self.max_cache_len or self.num_tokens + num_new + num_steps - 1
            try:
                self._budget.hold_all(dict(zip(numbers, (size * num_tokens for size in self.sizes), strict=True)))
            except KVCapacityError:
                if num_steps == 1:
                    raise
            else:
                return num_steps
        raise AssertionError

    def _slices(self) -> Iterator[slice]:
        return (slice(*bounds) for bounds in itertools.pairwise(itertools.accumulate(self.sizes, initial=0)))

    def finish_silent_steps(self) -> None:
        """Finish the steps in flight that want no logits."""
        for each in self.microbatches:
            each.finish_silent_steps()

    def drop_microbatches(self, sizes: Sequence[int]) -> None:
        """Run as fewer microbatches, of so many rows each, from the first step on."""
        for each in self.microbatches[len(sizes) :]:
            each.end()
        self.microbatches, self.sizes = self.microbatches[: len(sizes)], tuple(sizes)

    def join(self) -> None:
        """Make one session of all microbatches; it ends if that fails."""
        if len(self.microbatches) == 1:
            return
        self.finish_silent_steps()
        microbatches, joined = self.microbatches, self._open_session(None)
        try:
            join_rows(microbatches, joined)
        except BaseException:
            joined.end()
            raise
        finally:
            for each in microbatches:
                each.end()
            self.microbatches, self.sizes = [joined], (sum(self.sizes),)

    def reorder(self, rows: Tensor) -> None:
        """Keep the KV rows ``rows`` (int64 ``[new rows]``), each microbatch its own where the order allows that."""
        chosen = [rows[(rows >= own.start) & (rows < own.stop)] - own.start for own in self._slices()]
        is_in_order = torch.equal(
            torch.cat([each + own.start for each, own in zip(chosen, self._slices(), strict=True)]), rows
        )
        if not is_in_order or min(map(len, chosen)) < max(1, self.least_rows):
            self.join()
            chosen = [rows]
        for each, own in zip(self.microbatches, chosen, strict=True):
            each.reorder(own)
        self.sizes = tuple(map(len, chosen))

    def crop(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` tokens, as `Session.crop` does."""
        for each in self.microbatches:
            each.crop(num_tokens)

    def copy_to(self, other: SplitSession) -> None:
        """Make a session of as many microbatches that has just been opened go on from here, as `Session.copy_to` does."""
        if len(self.microbatches) == 1:
            other.join()
        try:
            for each, copied in zip(self.microbatches, other.microbatches, strict=True):
                each.copy_to(copied)
        except BaseException:
            other.end()
            raise
        other.sizes = self.sizes


class SplitStep:
    """A step of each microbatch in flight; see `lingualinked.cluster.steps.step_in_flight.StepInFlight`."""

    def __init__(self, session: SplitSession, flights: Sequence[StepInFlight]) -> None:
        self._session = session
        self._flights = flights

    @property
    def no_logits(self) -> tuple[Tensor, Recorded]:
        """What a step that wants no logits gives, as of a `StepInFlight`."""
        return torch.cat([flight.no_logits[0] for flight in self._flights]), {}

    def finish(self) -> tuple[Tensor, Recorded]:
        """Wait for all answers; return the logits and the records of all rows. If one fails, the session ends."""
        try:
            results = [flight.finish() for flight in self._flights]
        except BaseException:
            self._session.end()
            raise
        recorded = {
            name: tuple(_join(items) for items in zip(*(each[name] for _, each in results), strict=True))
            for name in results[0][1]
        }
        return torch.cat([logits for logits, _ in results]), recorded


def _join(items: Sequence[Tensor | None]) -> Tensor | None:
    """Join what the same layer recorded of all microbatches; its first dimension are rows, or rows x tokens."""
    known = [item for item in items if item is not None]
    return torch.cat(known) if known else None


def _adapters_of(use: AdapterUse | None, rows: slice) -> AdapterUse | None:
    return use if use is None or use.rows is None else msgspec.structs.replace(use, rows=use.rows[rows])

"""A batch of which each row is a session of its own, whose steps are packed: no row's bits depend on the others.

Knows rows, and pieces of their texts; neither generation nor why rows are apart.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingualinked.cluster.packed.packed_flight import PackedFlight, PackedPart
from lingualinked.cluster.sessions.session_group import SessionGroup
from lingualinked.cluster.sessions.stepped_session import PLAIN
from lingualinked.cluster.sessions.text_columns import NewText, TextColumns
from lingualinked.cluster.steps.step_in_flight import StepOptions
from lingualinked.errors import ArgumentError, LingualinkedError, UnsupportedOperationError

if TYPE_CHECKING:
    from lingualinked.cluster.kv.kv_budget import KVBudget
    from lingualinked.cluster.packed.packed_steps import PackedSteps
    from lingualinked.cluster.sessions.session import Session
    from lingualinked.cluster.steps.recorded import Recorded

PIECE_TOKENS = 256
"""A text's tokens are computed in pieces that end at multiples of this number, whatever else is in a step."""


class RowSessions(SessionGroup):
    """A session of rows that are computed apart, with the face of a `Session`.

    Padding is left out, by the attention mask; logits of padding are 0. The rows' steps are packed in ``num_microbatches`` that
    follow each other through the stages.
    """

    kv_has_gradients = False
    stepping_thread = None  # no step has hooks

    def __init__(
        self, packed: PackedSteps, open_session: Callable[[], Session], budget: KVBudget, num_microbatches: int = 1
    ) -> None:
        self.num_microbatches = num_microbatches
        self._packed = packed
        self._open_session = open_session
        self._budget = budget
        self._rows = [open_session()]  # of the first step, which tells how many there are
        self._columns: TextColumns | None = None  # None before the first step
        self._prepare: list[Callable[[Session], None]] = []  # what a session of a further row has to be told
        self._flights: collections.deque[RowsInFlight] = collections.deque()
        self._thread = 0  # which has started them

    @property
    def members(self) -> Sequence[Session]:
        """The sessions of its rows."""
        return self._rows

    @property
    def num_rows(self) -> int:
        """Rows whose KV is held."""
        return 0 if self._columns is None else len(self._rows)

    @property
    def num_tokens(self) -> int:
        """Columns of each row, padding included."""
        return 0 if self._columns is None else self._columns.num_columns

    def start_step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions = PLAIN,
    ) -> RowsInFlight:
        """Send the packed steps of a step, as `Session.start_step` does.

        Raises UnsupportedOperationError for what a packed step can't do.
        """
        # 1) refuse what can't be computed row by row, while nothing has changed
        _check_options(inputs, options)
        if self._flights and self._thread != threading.get_ident():
            raise ArgumentError("past_key_values is in use by another thread: a session runs one step at a time")
        columns = TextColumns(len(inputs)) if self._columns is None else self._columns.copy()
        texts = columns.add(inputs.shape[1], attention_mask, position_ids, logits_to_keep)
        # 2) count the KV of all rows, or of none
        if self._columns is None:
            self._set_num_rows(len(inputs))
        self._budget.hold_all(
            {
                row._number: row.max_cache_len or row.num_tokens + len(text.columns)  # noqa: SLF001 - within the room
                for row, text in zip(self._rows, texts, strict=True)
            }
        )
        self._columns, self._thread = columns, threading.get_ident()
        # 3) send their packed steps
        flight = RowsInFlight(self, texts, _num_kept(inputs.shape[1], logits_to_keep))
        self._flights.append(flight)
        try:
            for rows in self._microbatches():
                for parts, places in _pieces(self._rows, inputs, texts, rows):
                    flight.add(self._packed.start(parts), parts, places)
        except BaseException:
            self.end()
            raise
        return flight

    def finish_step(self, flight: RowsInFlight) -> Tensor:
        """Wait for the answers of a step; return its logits. If it fails, the session ends."""
        if not self._flights or self._flights[0] is not flight:
            raise ArgumentError("steps are finished in the order in which they were started, and each once")
        try:
            logits = flight.join()
        except BaseException:
            self.end()
            raise
        self._flights.popleft()
        return logits

    def drop_microbatches(self, sizes: Sequence[int]) -> None:
        """Run as fewer microbatches from now on."""
        self.num_microbatches = len(sizes)

    def finish_silent_steps(self) -> None:
        """Do nothing: steps of a prompt's chunks, which it does not have, are silent."""

    def reorder(self, rows: Tensor) -> None:
        """Keep the KV rows ``rows`` (int64 ``[new rows]``); one that is kept several times is copied in every stage."""
        before, kept = self._rows, [int(row) for row in rows.tolist()]
        moved: set[int] = set()
        sessions = []
        try:
            for row in kept:
                if row not in moved:
                    sessions.append(before[row])
                    moved.add(row)
                    continue
                sessions.append(self._open_session())
                before[row].copy_to(sessions[-1])
        except BaseException:
            for session in sessions:
                session.end()
            self.end()
            raise
        for row, session in enumerate(before):
            if row not in moved:
                session.end()
        self._rows = sessions
        assert self._columns is not None, "a handle has rows only after its first step"
        self._columns.reorder(torch.tensor(kept, dtype=torch.long))

    def crop(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` columns, as `Session.crop` does."""
        if self._columns is not None:
            for row, num_removed in zip(self._rows, self._columns.crop(num_tokens), strict=True):
                row.crop(num_removed)

    def copy_to(self, other: RowSessions) -> None:
        """Make a session that has just been opened go on from here, as `Session.copy_to` does."""
        try:
            while len(other._rows) < len(self._rows):
                other._rows.append(other._open_session())
            for row, copied in zip(self._rows, other._rows, strict=True):
                row.copy_to(copied)
        except BaseException:
            other.end()
            raise
        other._columns = None if self._columns is None else self._columns.copy()
        other._prepare = [*self._prepare]

    def record_past(self, on: bool) -> None:
        """Make sliding layers keep what a later crop may need, or stop keeping it."""
        super().record_past(on)
        self._prepare_later(lambda row: row.record_past(on))

    def reserve(self, num_tokens: int) -> None:
        """Reserve room for so many tokens per row in all, and for no more, where the KV grows."""
        super().reserve(num_tokens)
        self._prepare_later(lambda row: row.reserve(num_tokens))

    def end(self) -> None:
        """Free the session's KV in every stage."""
        self._flights.clear()
        super().end()

    def _prepare_later(self, prepare: Callable[[Session], None]) -> None:
        """Do the same with the sessions of further rows, which the first step opens."""
        if self._columns is None:
            self._prepare.append(prepare)

    def _set_num_rows(self, num_rows: int) -> None:
        """Open the sessions of the rows, before the first step; an attempt at one may have opened others."""
        while len(self._rows) > num_rows:
            self._rows.pop().end()
        while len(self._rows) < num_rows:
            self._rows.append(self._open_session())
            for prepare in self._prepare:
                prepare(self._rows[-1])

    def _microbatches(self) -> Iterator[range]:
        """Return the rows of each microbatch, as even as can be."""
        number = max(1, min(self.num_microbatches, len(self._rows) // 2))
        bounds = [len(self._rows) * index // number for index in range(number + 1)]
        return map(range, bounds, bounds[1:])


class RowsInFlight:
    """A step of all rows in flight; see `lingualinked.cluster.steps.step_in_flight.StepInFlight`."""

    def __init__(self, session: RowSessions, texts: Sequence[NewText], num_kept: int) -> None:
        self._session = session
        self._texts = texts
        self._num_kept = num_kept
        self._flights: list[tuple[PackedFlight, list[PackedPart], list[int]]] = []

    def add(self, flight: PackedFlight, parts: list[PackedPart], rows: list[int]) -> None:
        """Add a packed step with parts of these rows."""
        self._flights.append((flight, parts, rows))

    @property
    def no_logits(self) -> tuple[Tensor, Recorded]:
        """As `finish` gives: packed steps are waited for, and have the logits that were asked for."""
        return self.finish()

    def finish(self) -> tuple[Tensor, Recorded]:
        """Wait for all answers; return the logits, ``[rows, kept tokens, vocabulary]``. If one fails, the session ends."""
        return self._session.finish_step(self), {}

    def join(self) -> Tensor:
        """Wait for all answers, and put the logits of each row in their places; raise the first error of a row."""
        # 1) wait for all of them, whatever fails
        found: list[list[Tensor]] = [[] for _ in self._texts]
        errors: list[LingualinkedError] = []
        for flight, _, rows in self._flights:
            for row, reply in zip(rows, flight.result(), strict=True):
                if reply.error is not None:
                    errors.append(reply.error)
                elif reply.logits is not None:
                    found[row].append(reply.logits)
        if errors:
            raise errors[0]
        # 2) join those of each row
        known = [each for row in found for each in row]
        if not known:
            return torch.zeros((len(self._texts), self._num_kept, 0))
        logits = known[0].new_zeros((len(self._texts), self._num_kept, known[0].shape[-1]))
        for place, (text, own) in enumerate(zip(self._texts, found, strict=True)):
            if own:
                logits[place, _as_slice(text.places)] = torch.cat(own)[_as_slice(text.kept)]
        return logits


def _as_slice(indices: Tensor) -> Tensor | slice:
    """Return the slice of rising indices without a gap, if they are one: torch shares a selection by indices out among threads."""
    if not len(indices):
        return indices
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if torch.equal(indices, torch.arange(first, last + 1)) else indices


def _pieces(
    sessions: Sequence[Session], inputs: Tensor, texts: Sequence[NewText], rows: Sequence[int]
) -> Iterator[tuple[list[PackedPart], list[int]]]:
    """Cut the new texts of some rows into the parts of one packed step after another, and say whose they are."""
    bounds = {row: _piece_bounds(sessions[row].num_tokens, len(texts[row].columns)) for row in rows}
    for index in range(max(map(len, bounds.values())) - 1):
        parts, places = [], []
        for row in rows:
            if index + 1 < len(bounds[row]):
                start, stop = bounds[row][index : index + 2]
                text, after = texts[row], len(texts[row].columns) - stop
                num_logits = min(stop - start, max(0, text.num_logits - after))
                ids = inputs[row, text.columns[start:stop]].tolist()
                parts.append(PackedPart(sessions[row], ids, num_logits))
                places.append(row)
        yield parts, places


def _piece_bounds(num_held: int, num_new: int) -> list[int]:
    """Return where the pieces of a row's new tokens begin and end; a row without new tokens has none."""
    first = PIECE_TOKENS - num_held % PIECE_TOKENS
    return [0, *range(first, num_new, PIECE_TOKENS), num_new] if num_new else [0]


def _num_kept(num_new: int, logits_to_keep: int | Tensor) -> int:
    if isinstance(logits_to_keep, int):
        return len(range(num_new)[-logits_to_keep:])
    return len(torch.arange(num_new)[logits_to_keep])


def _check_options(inputs: Tensor, options: StepOptions) -> None:
    """Refuse by name what a packed step does not do."""
    refused = {
        "inputs_embeds": inputs.is_floating_point(),
        **{f"output_{name}": True for name in options.records},
        **dict.fromkeys(() if options.extras is None else options.extras.describe().names, True),
        "a hook on a module": options.hooks is not None,
        "a capture or an intervention": options.instruments is not None,
        "a gradient": options.gradients is not None,
        "an adapter": options.adapters is not None,
    }
    for name, is_asked in refused.items():
        if is_asked:
            raise UnsupportedOperationError(
                f"{name} is not possible with batch_invariant=True, which computes the tokens of all rows as one: load the model "
                "without it"
            )

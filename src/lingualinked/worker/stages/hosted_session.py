"""A stage's state of one session, and the edits of its KV: crops, orders of rows, rows of several sessions in one.

Knows sessions' state; neither stages nor messages on their way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from lingualinked.errors import ProtocolError
from lingualinked.model.context import StepContext
from lingualinked.model.hooks.instruments import StageInstruments
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.protocol.steps import KVEdit, KVEditKind
from lingualinked.quantities import count_text
from lingualinked.worker.kv.kv_copy import KVCopy


@dataclasses.dataclass(slots=True)
class HostedSession:
    """A stage's state of one session."""

    cache: StageCache | None  # its KV; None if it keeps none
    context: StepContext
    number: int = 0  # of its next step
    num_rows: int = 0  # with num_tokens the size that its KV has or will have, as counted against the budget
    num_tokens: int = 0
    runner: str = ""  # the worker that may send the first stage its next steps, in a run
    run_steps: int = 0  # how many of them
    instruments: StageInstruments | None = None  # captures and interventions at the stage's modules
    # In progress, by the plan version and stage of their target.
    copies: dict[tuple[int, int], KVCopy] = dataclasses.field(default_factory=dict)


def join_rows(parts: Sequence[HostedSession]) -> HostedSession:
    """Return a session of the rows of several, which are of no use afterwards; raise ProtocolError if they do not fit."""
    first, *others = parts
    caches = [part.cache for part in parts if part.cache is not None]
    if len(caches) != len(parts) or any(part.context.num_tokens != first.context.num_tokens for part in others):
        raise ProtocolError("sessions that are to be joined have seen other tokens, or keep no KV")
    caches[0].append_rows(caches[1:])
    caches[0].modules.append_rows([each.modules for each in caches[1:]], [part.num_rows for part in parts])
    return dataclasses.replace(
        first,
        context=first.context.join_rows([other.context for other in others]),
        number=0,
        num_rows=sum(part.num_rows for part in parts),
        runner="",
        run_steps=0,
        instruments=None,
        copies={},
    )


def edit_kv(edits: Sequence[KVEdit], session: HostedSession, cache: StageCache) -> None:
    """Make edits of a session's KV, except for orders of rows, which are made later (`reorder_rows`)."""
    for edit in edits:
        if edit.kind is not KVEditKind.REORDER:
            _apply_edit(edit, session, cache)


def reorder_rows(edits: Sequence[KVEdit], session: HostedSession, cache: StageCache, num_rows: int | None) -> None:
    """Reorder a session's KV by all orders at once; the result must have a step's number of rows, if there is one."""
    orders = [edit.values for edit in edits if edit.kind is KVEditKind.REORDER]
    if not orders:
        return
    if cache.num_rows:  # an index beyond them would end all that a GPU computes for this process
        orders.insert(0, tuple(range(cache.num_rows)))
    order = functools.reduce(_compose_orders, orders)  # intermediate orders may have any number of rows
    if num_rows is not None and len(order) != num_rows:
        raise ProtocolError(f"an order of {count_text(len(order), 'row')} of KV arrived in a step of {num_rows}")
    rows = torch.tensor(order, dtype=torch.long)
    cache.reorder(rows)
    session.context.reorder(rows)
    for copy in session.copies.values():
        copy.record_reorder(rows)


def _compose_orders(rows: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    if not all(0 <= row < len(rows) for row in order):
        raise ProtocolError(f"an order names rows that are not among {len(rows)}")
    return tuple(rows[row] for row in order)


def _apply_edit(edit: KVEdit, session: HostedSession, cache: StageCache) -> None:
    """Apply an edit to a session's KV, except for an order of rows."""
    if len(edit.values) != 1:
        raise ProtocolError(f"an edit of KV has {len(edit.values)} values, and must have one")
    (value,) = edit.values
    if edit.kind is KVEditKind.RECORD:
        cache.record_past(bool(value))
        return
    if edit.kind is KVEditKind.RESERVE:
        cache.reserve(value)
        return
    if not 0 <= value <= session.context.num_tokens:  # a negative number would corrupt the budget
        raise ProtocolError(
            f"a crop of {count_text(value, 'token')} exceeds the session's {session.context.num_tokens}"
        )
    cache.crop(value)
    session.context.crop(value)
    for copy in session.copies.values():
        copy.record_crop()

"""Makes one session of the rows of several, in every stage.

Knows sessions of one model between two steps; not why they are joined.
"""

# ruff: noqa: SLF001 - what is private to sessions is private to this room
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lingualinked.cluster.messaging.pending import results_of
from lingualinked.protocol.moving import JoinedRows

if TYPE_CHECKING:
    from lingualinked.cluster.sessions.session import Session


def join_rows(parts: Sequence[Session], joined: Session) -> None:
    """Make a session that has just been opened go on with the rows of others, which have seen as many tokens.

    Those are of no use afterwards, even if this fails.
    """
    first = parts[0]
    with contextlib.ExitStack() as use:
        for part in parts:
            use.enter_context(part._use.alone())
            use.enter_context(part._use.for_change())
        use.enter_context(joined._use.for_change())
        # 1) bring all of them to one route
        while True:
            for part in parts:
                part._switch_route()
                part._check_open()
                part._announce_switch()
            if all(part._place.route is first._place.route for part in parts):
                break
        joined._place.route = first._place.route
        joined.kv_age.copy_from(first.kv_age)
        if not first._holds_kv:
            joined._edits = [*first._edits]
            return
        # 2) join their rows in every stage, after the edits that have not reached the stages yet
        joined._budget.join([part._number for part in parts], joined._number)
        rows = [JoinedRows(session=part._number, number=part._next_step, edits=tuple(part._edits)) for part in parts]
        results_of(joined._requests.join(first._place.route, tuple(rows)))
        # 3) count what the stages hold now
        joined.num_rows, joined.num_tokens = sum(part.num_rows for part in parts), first.num_tokens
        joined.kv_has_gradients = any(part.kv_has_gradients for part in parts)
        joined._context = first._context.join_rows([part._context for part in parts[1:]])
        joined._holds_kv = True

"""What packed steps do with one session: keep it in use, count its tokens, end it if its part has failed.

Knows one session from within, as `cluster/sessions/session.py` does; neither other sessions nor answers.
"""

# ruff: noqa: SLF001 - the other half of Session

from __future__ import annotations

import contextlib
import threading

from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.sessions.session import Session
from lingualinked.errors import ArgumentError
from lingualinked.interrupts import wait_in_pieces
from lingualinked.model.packed.token_choice import TokenChoice
from lingualinked.protocol.packed import PackedText
from lingualinked.quantities import count_text


def check_session(session: Session, model: int) -> None:
    """Raise ArgumentError unless a session is one of a model's, of one row, without padding and instruments."""
    mask = session._context.mask
    wrong = ""
    if session._model != model:
        wrong = "it belongs to another model"
    elif session.num_tokens and session.num_rows != 1:
        wrong = f"it has {count_text(session.num_rows, 'row')}"
    elif mask is not None and not bool(mask.all()):
        wrong = "its text has padding"
    elif session._instruments is not None:
        wrong = "it has captures or interventions"
    elif session.kv_has_gradients:
        wrong = "its KV was computed with gradients"
    if wrong:
        raise ArgumentError(
            f"a session can't be part of a packed step: {wrong}; such a step takes sessions of one row without padding"
        )


def use_session(session: Session, uses: contextlib.ExitStack, timeout_s: float) -> Route:
    """Keep a session in use until ``uses`` is closed, and return the route that it runs on: the target, if it could switch."""
    session._finish_run()
    if session._flying_thread == threading.get_ident():
        session.finish_silent_steps()
    if session._place.route is not session._routes.target:
        wait_in_pieces(session._use.wait_for_rest, timeout_s)  # for packed steps of its own, which hold it on its route
    uses.enter_context(session._use.for_packed_step(session._switch_route))
    return session._place.route


def begin_part(session: Session, num_new: int, num_logits: int, choice: TokenChoice | None) -> PackedText:
    """Count new tokens of a session, and return its part in a packed step.

    Raises KVCapacityError if the KV budget would be exceeded, and the session stays as it is; what has ended it, if something has.
    """
    session._check_open()
    session.kv_age.begin_step(holds_kv=session._holds_kv)
    session._announce_switch()
    session._budget.hold(session._number, session.max_cache_len or session.num_tokens + num_new)
    text = PackedText(
        session=session._number,
        number=session._next_step,
        num_new=num_new,
        num_logits=num_logits,
        edits=tuple(session._edits),
        max_cache_len=session.max_cache_len,
        choice=choice,
    )
    session._context.encode(None, None, num_new)
    session._edits.clear()
    session._next_step += 1
    session._holds_kv = True
    session.num_rows = 1
    session.num_tokens += num_new
    return text


def break_session(session: Session, error: BaseException) -> None:
    """End a session whose part in a packed step has failed."""
    session._broken_by = f" with {type(error).__name__}"
    session.end()

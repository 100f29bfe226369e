"""What a handle on KV may hold: a session of any kind."""

from __future__ import annotations

from lingualinked.cluster.sessions.row_sessions import RowSessions
from lingualinked.cluster.sessions.session import Session
from lingualinked.cluster.sessions.split_session import SplitSession

AnySession = Session | SplitSession | RowSessions
"""Whole, of microbatches, or of rows that are computed apart."""

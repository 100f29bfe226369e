"""Whether the KV of a session was made before the model was changed, of which the session is told once.

Knows revisions only; neither changes nor KV.
"""

from __future__ import annotations

import sys
import warnings

from lingualinked.cluster.weights.tensor_edits import TensorEdits
from lingualinked.errors import StaleKVWarning

_LIBRARIES = frozenset({"contextlib", "lingualinked", "torch", "transformers"})


class KVAge:
    """The age of one session's KV."""

    def __init__(self, edits: TensorEdits) -> None:
        self._edits = edits
        self._revision = edits.revision  # of the model, when the KV was begun
        self._is_told = False

    @property
    def is_before_edit(self) -> bool:
        """Whether the model has changed since the first of the KV was made."""
        return self._revision != self._edits.revision

    def begin_step(self, *, holds_kv: bool) -> None:
        """Warn if a step is to use KV that was made before the model was changed, once."""
        if not holds_kv:
            self._revision, self._is_told = self._edits.revision, False
        elif self.is_before_edit and not self._is_told:
            self._is_told = True
            warnings.warn(
                "the KV of these past_key_values was made before the model was changed, and is used as it is, as by the "
                "unsharded model: start anew with past_key_values=None for KV of the changed model",
                StaleKVWarning,
                stacklevel=_user_level(),
            )

    def copy_from(self, other: KVAge) -> None:
        """Be as old as another session's KV."""
        self._revision, self._is_told = other._revision, other._is_told


def _user_level() -> int:
    """Return the level of the first frame, counted from the caller's, that belongs to no library."""
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - the frame of the caller
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level

"""How far rotary embeddings of the type "dynamic" are stretched, which outlasts a forward pass.

transformers keeps this state in the module, for whatever text comes next. Here the caller keeps it, for each session and for
each thread, and sends it with every step, so that each stage, even a new one, rotates as the unsharded model would that only
this thread uses. Knows configurations; no modules, no messages.
"""

from __future__ import annotations

import copy
import json
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingualinked.model.spec import ModelSpec


class RopeReach:
    """The length of text that rotary embeddings are stretched for, after some steps.

    A longer text stretches them further; a text within the model's own positions resets them.
    """

    def __init__(self, spec: ModelSpec) -> None:
        fields = json.loads(spec.config_json)
        parameters = fields.get("rope_parameters")
        self._unstretched: int = fields["max_position_embeddings"] if _has_type(parameters, "dynamic") else 0
        self._reach = self._unstretched
        self.depends_on_length = self._unstretched > 0 or _has_type(
            parameters, "longrope"
        )  # of the longest row of a step

    @property
    def advances(self) -> bool:
        """Whether the embeddings are ever stretched."""
        return self._unstretched > 0

    def copy(self) -> RopeReach:
        """Return an independent copy, which goes on from here."""
        return copy.copy(self)

    def advance(self, num_tokens: int) -> int:
        """Return how far the embeddings are stretched before a step (tokens; 0: never), then record the step.

        `num_tokens` is the length of the text at the end of the step: its highest position plus one.
        """
        reach = self._reach
        if not self._unstretched:
            return 0
        if num_tokens > reach:
            self._reach = num_tokens
        elif num_tokens < self._unstretched:
            self._reach = self._unstretched
        return reach


class RopeHistory(threading.local):
    """What the steps of each thread have left, in order, as in an unsharded model of its own: new sessions begin with it."""

    def __init__(self, spec: ModelSpec) -> None:
        self.reach = RopeReach(spec)


def _has_type(parameters: Any, name: str) -> bool:
    """Return whether rope parameters, for all layers or by type of layer, have a type."""
    if not isinstance(parameters, dict):
        return False
    if "rope_type" in parameters:
        return name in parameters["rope_type"]
    return any(_has_type(each, name) for each in parameters.values())

"""How far rotary embeddings of the type "dynamic" are stretched, which outlasts a forward pass and a session.

transformers keeps this state in the module, for whatever text comes next. Here the caller keeps it and sends it with every
step, so that each stage, even a new one, rotates as the unsharded model would. Knows configurations; no modules, no messages.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingualinked.model.spec import ModelSpec


class RopeReach:
    """The length of text that a model's rotary embeddings are stretched for.

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
        self._lock = threading.Lock()

    @property
    def advances(self) -> bool:
        """Whether the embeddings are ever stretched."""
        return self._unstretched > 0

    def advance(self, num_tokens: int) -> int:
        """Return how far the embeddings are stretched before a step (tokens; 0: never), then record the step.

        `num_tokens` is the length of the text at the end of the step: its highest position plus one.
        """
        if not self._unstretched:
            return 0
        with self._lock:  # sessions step in many threads; the lock puts their steps in one order
            reach = self._reach
            if num_tokens > reach:
                self._reach = num_tokens
            elif num_tokens < self._unstretched:
                self._reach = self._unstretched
        return reach


def _has_type(parameters: Any, name: str) -> bool:
    """Return whether rope parameters, for all layers or by type of layer, have a type."""
    if not isinstance(parameters, dict):
        return False
    if "rope_type" in parameters:
        return name in parameters["rope_type"]
    return any(_has_type(each, name) for each in parameters.values())

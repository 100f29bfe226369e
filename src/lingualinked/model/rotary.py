"""How far rotary embeddings of the type "dynamic" are stretched, which outlasts a forward pass and a session.

transformers keeps it in the module, for whatever text comes next: here the caller keeps it and every step tells it, so
that each stage, however new, rotates as the uncut model would. Knows configurations; no modules, no messages.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingualinked.model.spec import ModelSpec


class RopeReach:
    """The length of text that a model's rotary embeddings are stretched for.

    A longer text stretches them further; one within the model's own positions takes all of it back.

    Parameters
    ----------
    spec : ModelSpec
        Of the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        fields = json.loads(spec.config_json)
        self._unstretched: int = fields["max_position_embeddings"] if _is_dynamic(fields.get("rope_parameters")) else 0
        self._reach = self._unstretched
        self._lock = threading.Lock()

    def advance(self, num_tokens: int) -> int:
        """Return how far they are stretched before a step, and count the step.

        Parameters
        ----------
        num_tokens : int
            Of the text at the end of the step: its highest position plus one.

        Returns
        -------
        int
            Tokens; 0 where nothing is ever stretched.
        """
        if not self._unstretched:
            return 0
        with self._lock:  # sessions step in many threads; what each step is told makes an order of them
            reach = self._reach
            if num_tokens > reach:
                self._reach = num_tokens
            elif num_tokens < self._unstretched:
                self._reach = self._unstretched
        return reach


def _is_dynamic(parameters: Any) -> bool:
    """Whether the parameters, for all layers or by their type, ask for what depends on the texts before."""
    if not isinstance(parameters, dict):
        return False
    if "rope_type" in parameters:
        return "dynamic" in parameters["rope_type"]
    return any(_is_dynamic(each) for each in parameters.values())

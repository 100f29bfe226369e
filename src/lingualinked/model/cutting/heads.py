"""What a model's forward pass gives for each token: logits, hidden states, or what the head of a task makes of them.

Knows modules; neither stages nor what a class does with the result (pooling, losses): the caller does that.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lingualinked.errors import UncuttableModelError
from lingualinked.model.cutting.cut import SpanLeft
from lingualinked.model.cutting.tasks import EMBEDDINGS, GENERATION, task_of_class
from lingualinked.model.hf_internals.cache_arguments import cache_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


def find_head(model: PreTrainedModel) -> str | None:
    """Return the path of the module that ends a class for a task behind its base model; None for one without such a head."""
    name = type(model).__name__
    if task_of_class(name) in (GENERATION, EMBEDDINGS):
        return None
    base = model.base_model
    heads = [
        path
        for path, module in model.named_children()
        if module is not base and next(module.parameters(), None) is not None
    ]
    if base is model or not heads:
        raise UncuttableModelError(name, "no module with weights follows its base model")
    return heads[-1]


def cache_argument_of(model: PreTrainedModel) -> str | None:
    """Return the argument of a model's ``forward`` that takes what it keeps of a text, which a head may pass on to its base model."""
    name = cache_argument(type(model))
    if name is None and task_of_class(type(model).__name__) not in (GENERATION, EMBEDDINGS):
        parameters = inspect.signature(type(model).forward).parameters.values()
        name = (
            cache_argument(type(model.base_model))
            if any(each.kind is each.VAR_KEYWORD for each in parameters)
            else None
        )
    return name


class HeadPass:
    """Forward passes of a model, whole or cut, that end with its head, since all that follows is the caller's."""

    def __init__(self, model: PreTrainedModel, head: str | None) -> None:
        self._model = model
        self._head = head
        parameters = inspect.signature(model.forward).parameters
        takes_others = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._takes = None if takes_others else frozenset(parameters)
        self._has_logits = task_of_class(type(model).__name__) == GENERATION

    def run(self, *, is_last: bool, **arguments: Any) -> tuple[Any, Tensor | None]:
        """Run a forward pass; return its output, of the base model if there is a head, and what is given for each token.

        Both are None if the pass leaves the span; the second one unless the end of the model is here (``is_last``).
        """
        if not self._has_logits:
            arguments.pop("logits_to_keep", None)
        if self._takes is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._takes}
        kept: dict[str, Any] = {}
        with (
            contextlib.nullcontext() if self._head is None else self._watched(self._head, kept, is_last=is_last),
            contextlib.suppress(SpanLeft),
        ):
            result = self._model(**arguments)
            kept["result"] = result
            kept["output"] = result.logits if self._has_logits else result.last_hidden_state
        return kept.get("result"), kept.get("output")

    @contextlib.contextmanager
    def _watched(self, head: str, kept: dict[str, Any], *, is_last: bool) -> Iterator[None]:
        """Keep what the base model and the head return once their other hooks have run, and leave the pass there."""
        hooks = [
            self._model.base_model.register_forward_hook(_keep(kept, "result", is_end=not is_last)),
            self._model.get_submodule(head).register_forward_hook(_keep(kept, "output", is_end=True)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _keep(kept: dict[str, Any], name: str, *, is_end: bool) -> Callable[..., None]:
    """Return a hook that keeps what a module returns to this thread, since others may use the same module."""
    thread = threading.get_ident()

    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            kept[name] = output
            if is_end:
                raise SpanLeft

    return hook

"""Records the outputs of a model's modules by transformers' own hooks.

Knows what a class can record; no spans and no stages.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.utils import output_capturing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lingualinked.model.cutting.cut import RawOutput


INSTALLED = "_output_capturing_hooks_installed"
"""The attribute by which transformers knows that a module has its hooks."""


def recordable_outputs(model: torch.nn.Module) -> frozenset[str]:
    """Return what transformers records by hooks; empty for classes whose own forward collects it."""
    return frozenset(name for module in model.modules() for name in output_capturing._CAN_RECORD_REGISTRY.get(module))  # type: ignore[arg-type]


def selected_hidden_states(asked: Any, num_hidden_states: int) -> tuple[int, ...] | None:
    """Return the indices that a value of ``output_hidden_states`` selects, from 0; None if it is a flag."""
    if (selected := output_capturing.selected_hidden_states(asked)) is None:
        return None
    return tuple(sorted(output_capturing.resolve_hidden_states_indices(None, selected, num_hidden_states)))  # type: ignore[arg-type]


class Recorders:
    """The hooks by which transformers records a model's outputs: on its modules only while it records, as each costs time.

    What encodes pictures has its own, which transformers installs when it needs them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        towers = _towers(model)
        for module in model.modules():
            vars(module).pop(INSTALLED, None)  # modules that several cut models share
        _remove_hooks(towers)
        for module in model.modules():
            if output_capturing._CAN_RECORD_REGISTRY.get(module):  # type: ignore[arg-type]
                output_capturing.maybe_install_capturing_hooks(module)  # type: ignore[arg-type]
        _remove_hooks(towers)
        self._hooks = [
            (module._forward_hooks, number, hook)
            for module in model.modules()
            for number, hook in module._forward_hooks.items()
            if hook.__module__ == output_capturing.__name__
        ]
        with self.attached():
            pass

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Put the hooks on the modules within the context."""
        for hooks, number, hook in self._hooks:
            hooks[number] = hook
        try:
            yield
        finally:
            for hooks, number, _ in self._hooks:
                del hooks[number]


def record_incoming(output: RawOutput | None) -> None:
    """Record what a layer before the span has returned, if the forward pass in progress records hidden states, and has none."""
    collected = output_capturing._active_collector.get()
    if collected is not None and collected.get("hidden_states") == []:
        collected["hidden_states"].append(output[0] if isinstance(output, tuple) else output)


def recorded_modules(model: torch.nn.Module) -> frozenset[str]:
    """Return the paths of modules of which transformers records what they return."""
    hooked = {id(hooks) for hooks, _, _ in Recorders(model)._hooks}
    for module in model.modules():
        vars(module).pop(INSTALLED, None)
    return frozenset(path for path, module in model.named_modules() if id(module._forward_hooks) in hooked)


def record_first(module: torch.nn.Module) -> None:
    """Make transformers record what a module returns before its other hooks change it."""
    hooks: Any = module._forward_hooks  # an OrderedDict
    for number, hook in list(hooks.items()):
        if getattr(hook, "__module__", None) == output_capturing.__name__:
            hooks.move_to_end(number, last=False)


def record_too(name: str) -> None:
    """Record one more output of the forward pass that is in progress, as if it had been called for it."""
    collected = output_capturing._active_collector.get()
    if collected is not None:
        collected.setdefault(name, [])


def _towers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules inside models that are part of a model and are not on the way from its words to its layers."""
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    models = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    return [module for each in models if words not in set(each.modules()) for module in each.modules()]


def _remove_hooks(modules: list[torch.nn.Module]) -> None:
    """Remove the hooks of modules by which transformers records, so that it installs them when it needs them."""
    for module in modules:
        vars(module).pop(INSTALLED, None)
        hooks = module._forward_hooks
        for number in [key for key, hook in hooks.items() if hook.__module__ == output_capturing.__name__]:
            del hooks[number]

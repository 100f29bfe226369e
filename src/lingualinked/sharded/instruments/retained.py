"""Captures whose gradients are wanted: forward hooks that keep tensors of the user's own autograd graph.

Knows modules, hooks and which device runs which layers; a step with gradients stops at hooks in any case.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lingualinked.cluster.steps.captured import CapturedValue
from lingualinked.errors import ArgumentError
from lingualinked.model.hooks.hook_cuts import first_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.model.hooks.instrument_data import Side
    from lingualinked.sharded.instruments.captured import Captured


class RetainingBlock:
    """A ``with`` block during which hooks of modules keep what these compute, and make torch retain its gradient.

    `modules` are by the names of what is captured, with the paths by which stages know them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        parts: ModelParts,
        modules: Mapping[str, tuple[str, nn.Module]],
        side: Side,
        captured: Captured,
        *,
        of_thread: bool,
    ) -> None:
        self._pipeline, self._parts = pipeline, parts
        self._modules, self._side, self._captured = modules, side, captured
        self._of_thread = of_thread
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Captured:
        if self._handles:
            raise ArgumentError("this block is open already: call capture() for each block")
        thread = threading.get_ident() if self._of_thread else None
        self._handles = [self._register(name, path, module, thread) for name, (path, module) in self._modules.items()]
        return self._captured

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _register(self, name: str, path: str, module: nn.Module, thread: int | None) -> RemovableHandle:
        def keep(value: Any) -> None:
            if thread in (None, threading.get_ident()):
                self._keep(name, path, first_tensor(f"the {self._side} of {path}", value))

        if self._side == "input":
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: keep((*args, *kwargs.values())), with_kwargs=True
            )
        return module.register_forward_hook(lambda _module, _args, output: keep(output))

    def _keep(self, name: str, path: str, tensor: Tensor) -> None:
        self._captured.check_room(tensor.nbytes)
        if tensor.requires_grad:
            tensor.retain_grad()
        layer = self._parts.layer_beside(path, at_end=self._side == "output")
        (device,) = (stage.device for stage in self._pipeline.plan.stages if stage.start <= layer < stage.end)
        trusted = {each.name for each in self._pipeline.cluster.devices if each.trusted}
        value = CapturedValue(0, tensor, device, 0)
        self._captured.add(name, value, is_trusted=not trusted or device in trusted)

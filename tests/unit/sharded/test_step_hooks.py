"""What a worker says of a hooked call that does not fit it is the worker's error, and names its device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lingualinked as ll
from lingualinked.cluster.steps.step_reply import HookEvent, StepReply
from lingualinked.model.cutting.parts import find_parts
from lingualinked.model.hooks.hook_data import Entries, HookValue, Items, TensorAt
from lingualinked.protocol.hooking import HookReached
from lingualinked.sharded.hooks.hooked_modules import HookedModules
from lingualinked.sharded.hooks.recording_order import RecordingOrder
from lingualinked.sharded.hooks.step_hooks import CallerHooks
from lingualinked.sharded.sealed.sealing import sealed_class

LAYER = "model.layers.1"


def reached(output: HookValue | None) -> HookReached:
    """A step has stopped before a layer, or behind it."""
    args = Items(is_list=False, items=(TensorAt(0),)) if output is None else None
    kwargs = Entries("", (), ()) if output is None else None
    return HookReached(
        model=1,
        session=1,
        number=0,
        stage=1,
        path=LAYER,
        is_done=output is not None,
        args=args,
        kwargs=kwargs,
        output=output,
        strides=(None,),
    )


class ScriptedStep:
    """Stands for a step: what its stages say is given."""

    spans = (("a", 0, 1), ("b", 1, 2))

    def __init__(self, events: list[Any]) -> None:
        self._events = events
        self.points = ()
        self.is_abandoned = False

    def next_event(self) -> Any:
        return self._events.pop(0)

    def answer(self, *_: Any, **__: Any) -> None:
        pass

    def abandon(self) -> None:
        self.is_abandoned = True


STATES = torch.zeros(1, 2, 8)


@pytest.mark.parametrize(
    ("awaited", "words"),
    [
        (HookEvent(reached(TensorAt(7)), "b", (STATES,)), "a hooked call has 2 of what is numbered 7"),
        (HookEvent(reached(TensorAt(1)), "b", ()), "0 tensors arrived where 1 were due"),
        (StepReply((), (), 0), f"a step ended before the output of {LAYER} came, which has hooks"),
    ],
)
def test_an_output_that_can_not_be_is_the_workers_error(awaited: Any, words: str) -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config)
    adapters: Any = SimpleNamespace(num_changes=0, layers={})
    modules = HookedModules(dict(model.named_modules()), find_parts(model), adapters, ())
    step: Any = ScriptedStep([HookEvent(reached(None), "b", (STATES,)), awaited])
    cache: Any = None
    hooks = CallerHooks(modules, cache, {}, None, None)
    layer: Any = model.get_submodule(LAYER)
    vars(layer)["_recording"] = RecordingOrder(frozenset())
    layer.__class__ = sealed_class(type(layer))
    with (
        layer.register_forward_pre_hook(lambda *_: None),
        layer.register_forward_hook(lambda *_: None),
        pytest.raises(ll.WorkerError, match=f"device 'b' raised ProtocolError: {words}"),
    ):
        hooks.run(step)
    assert step.is_abandoned

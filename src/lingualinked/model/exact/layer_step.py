"""Decoder layers whose steps of one new token per row are one call of kernels, where this is found to have the layer's bits.

Knows layers and KV layers; no stages. What a layer calls is seen in its own steps, and its results are compared.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lingualinked.kernels import sequence
from lingualinked.kernels.attention import describe_rows
from lingualinked.model.exact import exact_attention
from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.exact.exact_gate import are_hooked
from lingualinked.model.exact.layer_program import MAX_ROWS, LayerParts, LayerProgram, build_program
from lingualinked.model.exact.layer_trace import trace_layer
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.hf_internals.computing import calls_attention
from lingualinked.model.kv.kv_layers import GrowingLayer
from lingualinked.model.process.torch_settings import flushes_denormals

_NUM_TRIALS = 2  # steps in which a layer's own results are compared with the kernels'
_MAX_PROGRAMS = 4  # of a layer: each has memory for its results
_SIMPLE = (bool, int, float, str)  # arguments of these types are compared from step to step
_CHANGING = frozenset(
    {"position_ids", "position_embeddings", "past_key_values"}
)  # arguments that may differ in each step


class FasterLayer(nn.Module):
    """Base of the classes of layers whose steps may be one call."""


def speed_up_layers(layers: Iterable[nn.Module]) -> None:
    """Make layers of a CPU model compute steps of few rows by one call of kernels, in place, once this is found to be exact.

    A layer keeps its parts, hooks and attributes. Its class becomes one that is derived from its own, by the same name.
    """
    for layer in layers if sequence.is_available() else ():
        if not isinstance(layer, FasterLayer) and any(isinstance(each, PackedLinear) for each in layer.modules()):
            layer_class: Any = type(layer)
            layer.__class__ = _faster_class(layer_class)


@functools.cache
def _faster_class(layer_class: Any) -> type[nn.Module]:
    own_forward = layer_class.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and layer_class.forward is own_forward and _is_step(args[0], kwargs):
            step = _steps.get(self)
            if step is None:
                step = _steps[self] = LayerStep(self)
            return step.compute(functools.partial(own_forward, self, *args, **kwargs), args[0], kwargs)
        return layer_class.forward(self, *args, **kwargs)

    names = {name: getattr(layer_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(layer_class.__name__, (FasterLayer, layer_class), {**names, "forward": forward})


def _is_step(states: Any, arguments: dict[str, Any]) -> bool:
    """Say whether a layer is called for one new token of few rows, without a mask, as torch computes by default."""
    angles = arguments.get("position_embeddings")
    return (
        type(states) is Tensor
        and states.dtype is torch.bfloat16
        and states.dim() == 3
        and states.shape[1] == 1
        and states.shape[0] <= MAX_ROWS
        and states.is_contiguous()
        and states.is_cpu
        and type(arguments.get("past_key_values")) is DynamicCache
        and arguments.get("attention_mask") is None
        and type(angles) is tuple
        and len(angles) == 2
        and all(type(each) is Tensor and each.dtype is torch.bfloat16 and each.is_contiguous() for each in angles)
        and angles[0].shape == angles[1].shape
        and torch.is_inference_mode_enabled()
        and exact_attention.computes_fused()
        and not flushes_denormals()
        and calls_attention(exact_attention.attend)
    )


class LayerStep:
    """What is known of one layer: its program for each number of rows, or that there is none."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)
        self._programs: dict[tuple[object, ...], _Trial] = {}
        self._modules = tuple(each for each in layer.modules() if each is not layer)
        self._links = [
            (vars(parent)["_modules"], name, each)
            for parent in layer.modules()
            for name, each in parent.named_children()
        ]

    def compute(self, own: Any, states: Tensor, arguments: dict[str, Any]) -> Any:
        """Compute a step, given the layer's own forward with its arguments."""
        if are_hooked(self._modules) or any(parent.get(name) is not each for parent, name, each in self._links):
            return own()
        angles = arguments["position_embeddings"]
        others = tuple((name, value) for name, value in arguments.items() if name not in _CHANGING)
        if not all(value is None or type(value) in _SIMPLE for _, value in others):
            return own()
        key = len(states), angles[0].shape, torch.get_num_threads(), others
        trial = self._programs.get(key)
        if trial is None:  # in the first step, probes compute as well
            if len(self._programs) == _MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = _Trial()
            return own()
        if trial.is_refused:
            return own()
        if trial.program is None or not trial.program.is_current():
            return self._begin(trial, own, states, angles)
        layer = arguments["past_key_values"].layers[trial.slot]
        if type(layer) is not GrowingLayer or layer.num_rows != len(states):
            return own()
        if trial.num_left:
            return self._compare(trial, own, layer, states, angles)
        result = _run(trial.program, layer, states, angles)
        return own() if result is None else result

    def _begin(self, trial: _Trial, own: Any, states: Tensor, angles: tuple[Tensor, Tensor]) -> Any:
        """Watch the layer compute a step, and build its program."""
        layer = self._layer()
        assert layer is not None
        trace = trace_layer(layer, own)
        parts = LayerParts.of(trace)
        trial.is_refused = True
        if parts is not None and len(trace.attention) == 1 and type(trace.result) is Tensor:
            trial.program = build_program(parts, trace.attention[0], angles[0].shape, len(states))
            slot = getattr(trace.attention[0].module, "layer_idx", None)
            if trial.program is not None and isinstance(slot, int):
                trial.slot, trial.num_left, trial.is_refused = slot, _NUM_TRIALS, False
        return trace.result

    def _compare(
        self, trial: _Trial, own: Any, layer: GrowingLayer, states: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Any:
        """Compute a step both ways; refuse the program if results, or new keys and values, differ."""
        assert trial.program is not None
        result = own()
        last = layer.stop - 1
        expected = [each.clone() for each in layer.read_tokens(last, 1)]
        layer.drop_last(1)
        found = _run(trial.program, layer, states, angles)
        if found is None:  # not finite: it shows nothing
            for held, each in zip(layer.update(*expected), expected, strict=True):
                assert held.shape[0] == each.shape[0]
            return result
        are_equal = have_equal_bits(found, result) and all(map(have_equal_bits, layer.read_tokens(last, 1), expected))
        if are_equal:
            trial.num_left -= 1
        else:
            trial.is_refused = True
            layer.drop_last(1)
            layer.update(expected[0], expected[1])
        return result


class _Trial:
    """A program on trial, for steps of one kind."""

    def __init__(self) -> None:
        self.program: LayerProgram | None = None
        self.slot = 0  # of the layer's KV
        self.num_left = 0  # comparisons that are still to be made
        self.is_refused = False


_steps: weakref.WeakKeyDictionary[nn.Module, LayerStep] = weakref.WeakKeyDictionary()


def _run(program: LayerProgram, layer: GrowingLayer, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor | None:
    """Compute a step by kernels; return None, and leave the KV as it was, if a result is not finite."""
    locations = layer.make_room(states.dtype)
    if locations is None:
        return None
    keys, values = locations
    key_row, value_row = layer.row_bytes
    texts = describe_rows(keys, key_row, values, value_row, len(states), layer.get_seq_length())
    result = program.run(states, *angles, texts)
    if result is None:
        layer.drop_last(1)
    return result

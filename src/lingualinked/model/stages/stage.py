"""One stage: a model's own forward pass over its span of layers.

Knows the inputs and outputs of a span; no sockets, sessions' owners or other stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.adapters.stage_adapters import StageAdapters
from lingualinked.model.cutting.cut import flatten_output, output_of, unflatten_output
from lingualinked.model.cutting.heads import HeadPass
from lingualinked.model.cutting.joining import join_spans, missing_spans
from lingualinked.model.cutting.parts import cache_slots
from lingualinked.model.cutting.stacks import kv_config, kv_slots
from lingualinked.model.exact import exact_attention
from lingualinked.model.exact.exact_rotary import faster_rotation
from lingualinked.model.exact.rounding_probe import find_groups, keeps_rows_apart, probe_rounding
from lingualinked.model.exact.speeding_up import speed_up
from lingualinked.model.hf_internals import building, computing, recording
from lingualinked.model.hooks.hook_data import HookPoint
from lingualinked.model.hooks.hook_points import HookedPass, ModuleCall, in_this_thread
from lingualinked.model.hooks.instruments import InstrumentedPass, StageInstruments
from lingualinked.model.kv.kept_values import KeptValues
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.process.accelerators import accelerator_device
from lingualinked.model.process.torch_settings import TorchSettings, frozen, read_torch_settings, torch_settings
from lingualinked.model.stages.drawing import draw_inputs
from lingualinked.model.stages.kept_argument import KeptArgument
from lingualinked.model.stages.layer_order import LayerList, SpanOrder
from lingualinked.model.stages.module_state import ModuleState
from lingualinked.model.stages.pictures import StagePictures
from lingualinked.model.stages.recorded_values import values_of_span
from lingualinked.model.stages.shortcuts import StageShortcuts
from lingualinked.model.stages.stage_data import StageInputs, StageOutput, check_indices, decode_inputs
from lingualinked.model.stages.step_graphs import CudaRecorder, DecodeInputs, StepGraphs
from lingualinked.model.weights.span_loading import LoadedSpan, load_span
from lingualinked.rounding import Rounding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from lingualinked.model.hooks.instrument_data import Instruments
    from lingualinked.model.spec import ModelSpec
    from lingualinked.model.weights.weight_sources import WeightSource


_ONLY_RECORDED = frozenset({"router_logits"})  # not requested: a class would compute a loss from one stage's alone


class Stage:
    """Layers ``[start, end)`` of a model, with what must run before or after them; for one thread at a time."""

    def __init__(self, span: LoadedSpan, start: int, end: int, device: torch.device) -> None:
        self.start, self.end, self.num_layers = start, end, span.parts.num_layers
        self.is_first, self.is_last = start == 0, end == self.num_layers
        model: nn.Module = span.model
        self.span, self._model, self._config = span, model.to(device), span.model.config
        self._boundary, self.device = span.boundary, device
        self._head_pass = HeadPass(span.model, span.parts.head)
        self.num_bytes_read = span.num_bytes_read  # from files, including headers
        self._base_bytes = span.parts.span_bytes(start, end)
        self.adapters = StageAdapters(self._model, device)
        layers = self._model.get_submodule(span.parts.layers)
        assert isinstance(layers, nn.ModuleList)
        if device.type == "cpu":
            speed_up(self._model, layers, self.adapters.layers)
        self._layers = LayerList(layers)
        self._model.set_submodule(span.parts.layers, self._layers)
        with self._boundary.answering():
            self._shortcuts = StageShortcuts(self._model, self._layers, span.parts, start, end)
        self.used_shortcuts = span.parts.shortcuts_to(start, end)
        self._items = span.parts.transmission.items
        self.layout_before = self._items[start - 1] if start else None  # of its inputs
        self._shows_shape = self.is_last or span.parts.layer_outputs[end - 1][0].is_regular
        self._pictures = StagePictures(self._model, span.parts.layers, end)
        self.kept = KeptArgument(span.model, self.num_layers, span.boundary)
        self._slots = self.cache_slots(start, end)
        self._ropes = computing.dynamic_ropes(self._model)
        self.module_state = ModuleState(self._model, self._config.model_type)
        is_sdpa = getattr(self._config, "_attn_implementation", None) == "sdpa"
        num_heads = computing.number_of_heads(self._config.get_text_config()) if is_sdpa else 0
        self.graphs = StepGraphs(device, CudaRecorder(device) if device.type == "cuda" else None, num_heads)
        self._recorders: recording.Recorders | None = None  # once a step has recorded
        self._rotary_modules = computing.rotary_modules(self._model) if device.type == "cpu" else []

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        start: int,
        end: int,
        *,
        accelerator: str = "cpu",
        progress: Callable[[int], None] | None = None,
        shared: Sequence[Stage] = (),
        open_files: Callable[[ModelSpec], WeightSource] | None = None,
        fallback: Callable[[PreTrainedModel], WeightSource] | None = None,
    ) -> Stage:
        """Load layers ``[start, end)`` of a model; read no other weights.

        Layers that the stages in `shared`, on the same accelerator, hold are shared with them, not loaded; those stages stay
        usable. `progress`, `open_files` and `fallback` are those of `load_span`.
        """
        device = accelerator_device(accelerator)
        # 1) load the layers that no shared stage holds
        loaded: list[Stage] = []
        report = None if progress is None else lambda done: progress(done + sum(each.weight_bytes for each in loaded))
        for missing in missing_spans(start, end, [(stage.start, stage.end) for stage in shared]):
            span = load_span(spec, *missing, progress=report, open_files=open_files, fallback=fallback)
            loaded.append(cls(span, *missing, device))
            if span.parts.changes_weights:  # before others share them
                loaded[-1].step(draw_inputs(span.parts, *missing), None)
        # 2) join them with the shared ones
        if len(loaded) == 1 and (loaded[0].start, loaded[0].end) == (start, end):
            return loaded[0]
        stage = cls(join_spans([each.span for each in (*shared, *loaded)], start, end), start, end, device)
        stage.num_bytes_read = sum(each.num_bytes_read for each in loaded)
        return stage

    def place_instruments(self, given: Instruments, tensors: tuple[Tensor, ...]) -> StageInstruments | None:
        """Find the modules of captures and interventions, whose tensors must fit them (ProtocolError); None without any here."""
        own = tuple(tensor.to(self.device) for tensor in tensors)
        placed = StageInstruments(
            self._model, self.span.parts, given, own, is_first=self.is_first, is_last=self.is_last
        )
        return placed if placed.places else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, of adapters too."""
        return self._base_bytes + self.adapters.num_bytes

    @property
    def rounding(self) -> Rounding:
        """How its results are rounded, as far as torch's functions for its dtype show."""
        if self.device.type != "cpu":
            return Rounding(self.device.type, 0)
        rounding = probe_rounding(self._config.dtype, torch.get_num_threads(), find_groups(self._model))
        return rounding if keeps_rows_apart(self._model, self._config.dtype) else Rounding(rounding.fingerprint, 0)

    def cache_slots(self, start: int, end: int) -> frozenset[int]:
        """Return the KV cache slots of layers ``[start, end)``, which the stage must hold."""
        own = cache_slots(self._layers[start:end])
        return frozenset(range(start, end)) if self.kept.keeps_own else kv_slots(self._model, own, self.num_layers)

    def new_cache(self, spare_bytes: Callable[[], float] = lambda: math.inf, max_cache_len: int = 0) -> StageCache:
        """Make the KV cache of a new session, of `max_cache_len` tokens (0: it grows) and at most `spare_bytes()` more bytes."""
        own, config = self.kept.new_state(), kv_config(self._model)
        cache = StageCache(config, self._slots, spare_bytes, max_cache_len, self.device, own=own)
        cache.modules.holds = self.module_state.holds
        return cache

    def step_shape(self, states: Tensor, shape: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return the numbers of rows and new tokens of a step with this input; raise ArgumentError if it can't be one.

        `shape` says it where the input of a later stage does not show it.
        """
        if self.is_first:
            return states.shape[0], states.shape[1]
        if shape is not None:
            return shape
        return self.span.parts.layer_outputs[self.start - 1][0].step_shape(states.shape)

    def step(self, inputs: StageInputs, cache: StageCache | None) -> StageOutput:
        """Run the model's forward pass over the span, and count its tokens in the KV cache, if there is one.

        The output is valid until the next step with this cache. The KV cache is unusable after a step that raises, unless it
        is static and has no room for the step (ArgumentError).
        """
        with torch.inference_mode() if inputs.graph is None else torch.enable_grad():
            return self._step(inputs, cache)

    def _step(self, inputs: StageInputs, cache: StageCache | None) -> StageOutput:
        # 1) a static cache has to have room: beyond it, an accelerator would write to other memory
        _, num_new = self.step_shape(inputs.tensors[0], inputs.shape)
        if cache is not None:
            cache.check_room(num_new)
        # 2) replay the step if it has been captured; else run it, and capture it if that is possible
        graph = decode = None
        keeps_state = bool(self._ropes or self.module_state or self._shortcuts.cross) or not self._shows_shape
        if cache is not None and not keeps_state and not self.adapters and self.graphs.serve(cache):
            decode = decode_inputs(inputs, cache)
        if decode is not None and cache is not None:
            constants = inputs.layout, inputs.logits_to_keep
            template = dataclasses.replace(inputs, tensors=(), attention_mask=None, position_ids=None)
            owners = weakref.proxy(self), weakref.proxy(cache)  # they keep the graph, which is freed with them
            forward = functools.partial(Stage._run_decode, *owners, template)
            make_masks = functools.partial(Stage._make_masks, *owners)
            graph = self.graphs.find(decode, constants, inputs.torch_settings, forward, make_masks, cache)
        if graph is not None and graph.is_trusted and decode is not None:
            output = StageOutput(tensors=graph.run(decode), layout=graph.layout)
            self.graphs.num_replayed += 1
        else:
            output = self._run_forward(inputs, cache)
            if inputs.graph is not None:
                output.tensors = inputs.graph.end(output.tensors, self._model.parameters())
                output.requires_grad = inputs.graph.outputs_require_grad
                output.ends_at_tap = inputs.graph.ends_at_tap
            if graph is not None and decode is not None:
                graph.layout = output.layout
                self.graphs.end_trial(graph, decode, output.tensors)
            output.tensors = self._finished(output.tensors)
        # 3) count the tokens
        if cache is not None:
            cache.advance(num_new, inputs.skips.indices)
        return output

    def _finished(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Wait until outputs are computed; return them, on the CPU or on a GPU, from which they are sent without a detour."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
            return outputs
        return tuple(tensor.cpu() for tensor in outputs)

    def _run_decode(self, cache: StageCache, template: StageInputs, inputs: DecodeInputs) -> tuple[Tensor, ...]:
        """Run a step of one token whose inputs are on the device; the rest is as in a step before."""
        tensors, mask, positions = (inputs.states,), inputs.mask, inputs.positions
        step = dataclasses.replace(template, tensors=tensors, attention_mask=mask, position_ids=positions)  # type: ignore[arg-type]
        return self._run_forward(step, cache).tensors

    def _make_masks(self, cache: StageCache, inputs: DecodeInputs) -> dict[str, Tensor]:
        """Make the masks of a step as ``generate`` does for a static cache."""
        states, mask, positions = map(self._to_device, (inputs.states, inputs.mask, inputs.positions))
        return computing.make_masks(self._config, states, mask, cache.hf, positions)

    def _run_forward(self, inputs: StageInputs, cache: StageCache | None) -> StageOutput:
        """Run the model's forward pass over the span; return its outputs, still on the device, and what was recorded."""
        # 1) put the inputs where the model's forward, or its stand-ins, expect them
        tensors = tuple(tensor.to(self.device) for tensor in inputs.tensors)
        if inputs.graph is not None:
            if self._shortcuts.cross or len(tensors) > 1:
                raise UnsupportedOperationError(
                    f"gradients are not supported for {type(self._model).__name__}, whose layers use more than the hidden "
                    "states of the layer before: call the model under torch.no_grad()"
                )
            tensors = inputs.graph.begin(tensors)
        states = tensors[0]
        arguments: dict[str, Any] = {
            "attention_mask": self._to_device(inputs.attention_mask),
            **self.kept.arguments(cache),
        }
        if inputs.position_ids is not None:
            arguments["position_ids"] = self._to_device(inputs.position_ids)
        num_rows, num_new = self._boundary.shape = self.step_shape(states, inputs.shape)
        self._boundary.device = self.device
        self._boundary.shortcuts = shortcuts = {name: each.to(self.device) for name, each in inputs.shortcuts.items()}
        arguments |= self._shortcuts.text_arguments(states, self._boundary.shape, shortcuts)
        if not self.is_first:
            self._boundary.incoming = unflatten_output(tensors, inputs.layout)
        if self.is_last:
            self._boundary.is_end = not inputs.wants_logits and not inputs.records and not self._boundary.keeps_own
            if self.device.type != "cpu":
                check_indices(inputs.logits_to_keep, num_new)
            arguments["logits_to_keep"] = self._to_device(inputs.logits_to_keep)
        self._boundary.is_passed = bool(inputs.records) or self._boundary.keeps_own
        if inputs.records:
            arguments |= {f"output_{name}": True for name in inputs.records if name not in _ONLY_RECORDED}
        # 2) run the forward pass, which ends with logits or at the first layer after the span
        layout: tuple[bool, ...] | None = None
        order, hooks = self._prepare_layers(inputs, cache, num_new)
        made = self._shortcuts.begin(states)
        hooks += self._shortcuts.register_hooks(made)
        count = cache.count if cache is not None and cache.is_static else None
        instrumented = None
        stops = contextlib.ExitStack()
        try:
            with contextlib.ExitStack() as shared:
                shared.enter_context(self._own_globals(inputs, cache, inputs.torch_settings))
                if inputs.instruments is not None:
                    instrumented = stops.enter_context(
                        InstrumentedPass(inputs.instruments, num_rows, num_new, inputs.past, captures=inputs.captures)
                    )
                if inputs.hooks:
                    pause = functools.partial(self._pause, inputs, cache, shared)
                    stops.enter_context(HookedPass(self._model, self.span.parts.layers, inputs.hooks, pause))
                if count is not None:
                    count.begin_step(num_new)
                hooks += self._put_in_order(order)
                arguments |= self._pictures.arguments(inputs, states)
                with self._pictures.checked(inputs):
                    result, output = self._head_pass.run(is_last=self.is_last, **arguments)
                self.kept.keep(cache, result, num_rows)
                if count is not None:
                    count.end_step()
            if self.is_last:
                outputs: tuple[Tensor, ...] = (cast("Tensor", output),) if inputs.wants_logits else ()
            else:
                items = self._items[self.end - 1]
                outputs, layout = flatten_output(output_of(self._boundary, items), items)
            recorded = {
                name: values_of_span(
                    name, result.get(name) or (), (self.start, self.end, self.num_layers), inputs, order, self._model
                )
                for name in inputs.records
            }
        finally:
            self._layers.order = None
            stops.close()
            for hook in hooks:
                hook.remove()
            self._boundary.clear()
        captured = [] if instrumented is None else [(number, value.cpu()) for number, value in instrumented.captured]
        return StageOutput(
            tensors=outputs,
            layout=layout,
            shape=None if self._shows_shape else (num_rows, num_new),
            shortcuts=made,
            recorded=recorded,
            captured=captured,
        )

    def _prepare_layers(
        self, inputs: StageInputs, cache: StageCache | None, num_new: int
    ) -> tuple[SpanOrder | None, list[RemovableHandle]]:
        """Return which layers to run, if some are skipped, and the hooks at both ends of the span."""
        order = None
        own: Sequence[nn.Module] = self._layers[self.start : self.end]
        if inputs.skips.indices:
            order = SpanOrder(self._layers, self.start, self.end, inputs.skips, self._boundary, self._items)
            own = order.own
        if not own:  # what comes in is what goes out
            incoming = self._boundary.outgoing = self._boundary.incoming
            assert order is not None
            record = in_this_thread(lambda *_: recording.record_incoming(incoming))
            return order, [order.order[-1].register_forward_pre_hook(record)] if self.is_last else []
        # The hooks are for this pass only: stages that share the layer have their own.
        hooks = [own[-1].register_forward_hook(self._boundary.capture_output)]
        hooks += [
            own[0].register_forward_pre_hook(in_this_thread(lambda *_, name=name: recording.record_too(name)))
            for name in _ONLY_RECORDED.intersection(inputs.records)
        ]
        if self.start and inputs.records:  # as the class does behind the layer, and not what pre-hooks make of it
            record = in_this_thread(lambda _module, _args, output: recording.record_incoming(output))
            hooks.append(self._layers[self.start - 1].register_forward_hook(record))
        if cache is not None and not cache.is_plain:
            count_new = in_this_thread(lambda *_: cache.enter_span(num_new, inputs.skips.indices))
            hooks.append(own[0].register_forward_pre_hook(count_new))
        return order, hooks

    def _put_in_order(self, order: SpanOrder | None) -> list[RemovableHandle]:
        """Run the layers in this order from now on; return the hook that feeds the first one, ahead of those that look at it."""
        self._layers.order = None if order is None else order.order
        if order is None or not order.feeds_first:
            return []
        feed = in_this_thread(order.feed_first(self._boundary))
        return [order.own[0].register_forward_pre_hook(feed, with_kwargs=True, prepend=True)]

    @contextlib.contextmanager
    def _own_globals(self, inputs: StageInputs, cache: StageCache | None, settings: TorchSettings) -> Iterator[None]:
        """Make what all steps of this process share be that of one step."""
        if inputs.records and self._recorders is None:
            self._recorders = recording.Recorders(self._model)
        kept = KeptValues() if cache is None else cache.modules
        with (
            contextlib.nullcontext() if self._recorders is None or not inputs.records else self._recorders.attached(),
            building.GLOBAL_STATE,
            self._boundary.answering(),
            torch_settings(settings),
            computing.computed_attention(exact_attention.attend),
            computing.computed_rotation(self._rotary_modules, faster_rotation),
            self.adapters.used(inputs.adapters),
            contextlib.nullcontext() if inputs.graph is None else frozen(self._model),
            self.module_state.lent_to(kept, is_first=cache is None or not cache.num_tokens),
        ):
            for rope in self._ropes if inputs.rope_reach else ():
                rope.stretch(inputs.rope_reach, self.device)
            yield

    def _pause(
        self, inputs: StageInputs, cache: StageCache | None, shared: contextlib.ExitStack, call: ModuleCall
    ) -> tuple[HookPoint, ...] | None:
        """Wait for the hooks of a module; other steps may run meanwhile, on this stage too."""
        assert inputs.pause is not None
        settings = read_torch_settings() if inputs.torch_settings else {}
        boundary, order = vars(self._boundary).copy(), self._layers.order
        self._layers.order = None
        shared.close()
        try:
            return inputs.pause(call)
        finally:
            shared.enter_context(self._own_globals(inputs, cache, settings))
            vars(self._boundary).update(boundary)
            self._layers.order = order

    def _to_device(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

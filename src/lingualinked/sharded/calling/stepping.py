"""Checks the arguments of a call, and runs it as one step through the pipeline.

Knows transformers' arguments and a pipeline; neither losses nor output classes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lingualinked.cluster.steps.step_in_flight import StepOptions
from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.hf_internals.building import makes_pipeline_for_device
from lingualinked.model.hf_internals.computing import number_of_heads
from lingualinked.sharded.calling.cache import ShardedCache, ShardedDynamicCache
from lingualinked.sharded.calling.given_cache import GivenCache, adopt, check_empty, max_cache_len_of
from lingualinked.sharded.calling.gradients import StepGradients
from lingualinked.sharded.calling.inputs import (
    LearnedPositions,
    StepShape,
    check_inputs,
    refuse_arguments,
    take_records,
)
from lingualinked.sharded.generating.asked_run import asked_run, step_as_asked
from lingualinked.sharded.generating.prefill import options_of_chunk
from lingualinked.sharded.hooks.hooked_modules import HookedModules
from lingualinked.sharded.hooks.step_hooks import CallerHooks
from lingualinked.sharded.instruments.in_force import OpenBlocks
from lingualinked.sharded.loading.model_code import ModelCode, check_observers

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.cluster.steps.recorded import Recorded
    from lingualinked.cluster.steps.step_extras import StepExtras
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.sharded.calling.pictures import FurtherArguments
    from lingualinked.sharded.sealed.sealed_config import SealedConfig
    from lingualinked.sharded.sealed.sealing import Seal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckedStep:
    """The arguments of a step, checked, on the CPU."""

    inputs: Tensor  # ids [rows, tokens], or embeddings, in the user's graph
    shape: StepShape
    mask: Tensor | None
    positions: Tensor | None
    past: GivenCache | None
    records: tuple[str, ...]  # which outputs of layers are asked for
    selected: tuple[int, ...] | None  # of hidden states; None: all
    rows: Any  # adapter_names
    extras: StepExtras | None  # further arguments of the forward


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave."""

    output: Tensor | None  # in the user's graph; None if the step has begun a run
    recorded: dict[str, Any]
    cache: ShardedCache


class ShardedSteps:
    """Mixin that runs one step of a sharded model of any class; comes last of ours in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        config: Any
        _pipeline: Pipeline
        _parts: ModelParts
        _positions: LearnedPositions | None
        _code: ModelCode
        _embedding_shape: tuple[int, int]
        _further: FurtherArguments
        _hooked_modules: HookedModules
        _open_blocks: OpenBlocks
        _seal: Seal
        _sealed_config: SealedConfig
        _own_arguments: tuple[str, ...]
        _cache_name: str | None
        _recordable: frozenset[str]

        def _use_adapters(self, rows: Any, num_rows: int) -> Any: ...

        @property
        def _adapters(self) -> Any: ...

    @property
    def device(self) -> torch.device:
        """The device of inputs and logits: the CPU, wherever the stages compute."""
        return torch.device("cpu")

    @property
    def hf_device_map(self) -> dict[str, str]:
        """Accelerator of every layer and of the modules around them, in accelerate's format.

        The first entry is the device of the inputs, since code that looks for it reads the first entry.
        ``transformers.pipeline(device=...)`` refuses models that have such a map: for that call there is none, and the
        pipeline asks the model to move instead. Nor is there one for peft, which would dispatch layers to devices of this process, or
        for ``generate`` where it calls an encoder, to which it would add hooks of accelerate.
        """
        caller = sys._getframe(1)  # noqa: SLF001 - the frame of the caller
        encodes = caller.f_code.co_name == "_prepare_text_encoder_decoder_kwargs_for_generation"
        if encodes or makes_pipeline_for_device(caller) or caller.f_globals.get("__name__", "").startswith("peft."):
            raise AttributeError("hf_device_map")
        device = self._pipeline.cluster.device
        accelerators = [(stage, device(stage.device).accelerator) for stage in self._pipeline.plan.stages]
        placed = {"": str(self.device)} | dict.fromkeys(self._parts.prologue, accelerators[0][1])
        for stage, accelerator in accelerators:
            for index in range(stage.start, stage.end):
                placed[f"{self._parts.layers}.{index}"] = accelerator
        return placed | dict.fromkeys(self._parts.epilogue, accelerators[-1][1])

    def _check_callable(self) -> None:
        """Refuse a model that is closed, traced or changed."""
        self._pipeline.check_open()
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # would record the answer as a constant
            raise UnsupportedOperationError("torch.jit.trace() of a sharded model: call the model itself")
        if self._checked_in_call():
            check_observers()  # `generate` has checked the rest, but these may change between steps
        else:
            self._check_unchanged()

    def _check_step(
        self,
        input_ids: object,
        inputs_embeds: object,
        attention_mask: object,
        position_ids: object,
        past_key_values: object,
        others: Mapping[str, Any],
    ) -> CheckedStep:
        """Check the arguments of a step; raise what `ShardedCausalLM.forward` does."""
        arguments = dict(others)
        cache_position, rows = arguments.pop("cache_position", None), arguments.pop("adapter_names", None)
        skips = self._pipeline.edits.skips
        num_layers = skips.num_before(self._pipeline.plan.stages[-1].end)
        records, selected = take_records(self.config, arguments, self._recordable, num_layers)
        if records and skips.bypassed:
            raise UnsupportedOperationError(
                f"{', '.join(records)} of a sharded model in which nn.Identity() is in place of a layer: delete the layer instead"
            )
        extras = self._further.take(arguments, has_positions=position_ids is not None)
        refuse_arguments(arguments, self._own_arguments)
        inputs = check_inputs(input_ids, inputs_embeds, *self._embedding_shape)
        past = self._check_past(past_key_values, inputs.shape[0])
        shape = StepShape(
            rows=inputs.shape[0],
            past=0 if past is None else past.get_seq_length(),
            new=inputs.shape[1],
            heads=number_of_heads(self.config.get_text_config()) or None,
            window=self._sliding_window,
            max_cache_len=0 if past is None else max_cache_len_of(past),
            sees_pictures=bool(self._further.names),
        )
        mask = shape.check_mask(attention_mask)
        positions = shape.check_positions(position_ids)
        shape.check_cache_position(cache_position)
        return CheckedStep(
            inputs=inputs,
            shape=shape,
            mask=mask,
            positions=positions,
            past=past,
            records=records,
            selected=selected,
            rows=rows,
            extras=extras,
        )

    def _run_step(self, step: CheckedStep, *, keep: int | Tensor, use_cache: bool | None, keeps_kv: bool) -> StepResult:
        """Run a step in the session of the given KV cache, or in a new one, which ends with it unless it keeps KV."""
        if self._positions is not None:
            self._positions.check(step.shape.past, step.shape.new, step.mask, step.positions)
        cache = self._open_session_for_step() if step.past is None else self._as_session(step.past)
        cache.check_room(step.shape.new)
        adapters = self._use_adapters(step.rows, step.shape.rows)
        self._follow_adapters()
        inputs, records = step.inputs, step.records
        gradients = StepGradients.of(inputs, cache, records, has_hooks=bool(self._hooked_modules))
        given = {"use_cache": use_cache, self._cache_name or "": None if step.past is None else cache}
        recording = self._seal.recording if records else None
        if recording is not None:
            recording.has_recorded = True
        hooks = CallerHooks(self._hooked_modules, cache, given, gradients, recording) if self._hooked_modules else None
        blocks = self._open_blocks
        instruments = (
            blocks.in_force(cache, self._pipeline.spec, takes_embeddings=inputs.is_floating_point()) if blocks else None
        )
        asked = None if records or hooks or instruments or gradients else asked_run(self)
        options = StepOptions(
            keeps_kv=keeps_kv,
            records=records,
            hidden_state_indices=step.selected,
            hooks=hooks,
            instruments=instruments,
            gradients=gradients,
            adapters=adapters,
            extras=step.extras,
        )
        try:
            output, found = step_as_asked(
                asked,
                cache.session,
                (inputs.detach(), step.mask, step.positions, keep),
                options_of_chunk(cache.session, options, step.shape.new),
                None if self._positions is None else self._positions.num_positions,
            )
        finally:
            if not keeps_kv:
                cache.end()
        recorded: Recorded = found
        if hooks is not None and "hidden_states" in recorded:
            recorded["hidden_states"] = hooks.restore_states(recorded["hidden_states"], self._pipeline.edits.skips)
        if "attentions" in recorded and "cross_attentions" in self._recordable:
            recorded["cross_attentions"] = ()  # as the class does without an encoder
        if gradients is not None and output is not None:
            output = gradients.end(output)
        return StepResult(output=output, recorded=recorded, cache=cache)

    def _follow_adapters(self) -> None:
        """Find the submodules anew once adapters have wrapped some, which changes their paths."""
        if self._hooked_modules.num_changes != self._adapters.num_changes:
            modules, wrapped = self._hooked_modules.modules, self._seal.wrapped.wrapped
            self._hooked_modules = HookedModules(modules, self._parts, self._adapters, wrapped)

    def _check_unchanged(self) -> None:
        """Refuse to run if something was changed in this process that would not affect the workers."""
        check_observers()
        self._code.check(self.config)
        self._seal.check(self)  # type: ignore[arg-type]  # a PreTrainedModel by its real class
        self._sealed_config.check(self.config)

    def _check_past(self, given: object, num_rows: int) -> GivenCache | None:
        """Check and return the KV cache to continue from."""
        if isinstance(given, ShardedCache):
            given.check(self._pipeline, num_rows)
            return given
        return None if given is None else check_empty(given, self.config)

    def _asks_for_kv(self, use_cache: bool | None) -> bool:
        """Whether a call asks for KV for a next one; without a value, the config says it, or the class has no KV then."""
        if use_cache is not None:
            return bool(use_cache)
        own, of_text = self.config, self.config.get_text_config(decoder=True)
        return bool(getattr(own, "use_cache", getattr(of_text, "use_cache", False)))

    def _checked_in_call(self) -> bool:
        """Whether a call is running that has checked the model for all its steps."""
        return False

    def _as_session(self, past: GivenCache, sizes: Sequence[int] = ()) -> ShardedCache:
        """Return the handle of a session; turn an empty KV cache into that of a new one, in microbatches of such sizes."""
        return adopt(past, self._pipeline, self._sliding_window, sizes)

    def _open_session_for_step(self) -> ShardedCache:
        """Open a session for a step that is given none."""
        return ShardedDynamicCache(self._pipeline, self._sliding_window)

    @functools.cached_property
    def _sliding_window(self) -> int | None:
        """Tokens that the narrowest sliding layer sees; ``None`` if there is no sliding layer."""
        layers: list[Any] = DynamicCache(config=self.config).layers
        return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)

"""Measures how long the parts of a model take on this device, with its real modules and shapes.

Knows stages and shapes of steps; no other devices, and no plans.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.cutting.architectures import read_config
from lingualinked.model.process.accelerators import accelerator_device
from lingualinked.model.process.memory import release_memory
from lingualinked.model.stages.drawing import draw_shortcuts, draw_states
from lingualinked.model.stages.stage import Stage
from lingualinked.model.weights.span_loading import load_span
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.protocol.measuring import MeasuredShape, MeasureModel, ModelMeasured
from lingualinked.protocol.steps import Step
from lingualinked.rounding import Rounding, independent_rows
from lingualinked.worker.measuring.module_timer import ModuleTimer, clock_of
from lingualinked.worker.measuring.power import PowerMeter, find_counter
from lingualinked.worker.process.limits import describe_hardware, free_bytes
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.steps.pace import Pace

_FLUSH_BYTES = 64 << 20  # more than a processor's caches hold
_NUM_IDS = 64  # token ids to choose from; fewer if the vocabulary is smaller
_MAX_REPEAT_S = 1.0  # for one shape, unless two steps take longer
_MAX_FACTOR = 2  # times the repetitions wanted, if times spread
_MAX_SPREAD = 0.25  # interquartile range / median, above which a step is repeated further
_NEGLIGIBLE_SPREAD_S = 1e-4

Part = str | int
"""A part of a model: a kind of layer, ``"prologue"``, ``"epilogue"``, or ``"stage"`` (everything else)."""

_Sample = dict[Part, float]
"""Seconds of one step, by part."""


class Measurer:
    """Runs spans of a model and records the time of each part; `on_progress` gets the number of shapes measured.

    Weights are filled in, not read. Of two layers in a row the second one counts: like all but the first layer of a stage,
    it finds its code in the processor's caches and its weights in memory.
    """

    def __init__(self, request: MeasureModel, accelerator: str, pace: Pace, on_progress: Callable[[int], None]) -> None:
        self._request = request
        self._accelerator = accelerator
        self._device = accelerator_device(accelerator)
        self._pace = pace
        self._on_progress = on_progress
        self._num_done = 0
        # Of spans of one layer only, each counts as a pair; where a model forbids cuts, spans have more layers than two.
        self._least_layers = min(2, max(end - start for start, end in request.spans))
        pairs = [end for start, end in request.spans if end - start >= self._least_layers]
        self._paired = {request.kind_of_layer[end - 1] for end in pairs}
        self._samples: defaultdict[tuple[Part, MeasuredShape], list[float]] = defaultdict(list)
        self._roundings: list[Rounding] = []  # of the spans
        # Read before each step: in service, the processor's caches hold neither weights nor code at that time either.
        self._flushing = torch.zeros(_FLUSH_BYTES // 4) if accelerator == "cpu" else None
        self._clock = clock_of(self._device, pace)
        self._power = PowerMeter(find_counter(accelerator), pace.emulated_clock_s)

    def run(self) -> ModelMeasured:
        """Measure every span of the request."""
        with torch.inference_mode():
            for start, end in self._request.spans:
                self._measure_span(start, end)
                release_memory(self._accelerator)
        steps: defaultdict[Part, list[StepTime]] = defaultdict(list)
        for (part, shape), seconds in self._samples.items():
            low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
            steps[part].append(
                StepTime(
                    rows=shape.rows,
                    tokens=shape.tokens,
                    context=shape.context,
                    seconds=max(middle, 0.0),
                    spread_s=max(high - low, 0.0),
                )
            )
        parts = {part: ModuleTimes(tuple(times)) for part, times in steps.items()}
        watts, power_source = self._power.result()
        return ModelMeasured(
            request=self._request.request,
            hardware=describe_hardware(self._accelerator),
            free_bytes=free_bytes(self._accelerator),
            layers={part: times for part, times in parts.items() if isinstance(part, int)},
            stage=parts.get("stage"),
            prologue=parts.get("prologue"),
            epilogue=parts.get("epilogue"),
            watts=watts,
            power_source=power_source,
            rounding=Rounding(self._roundings[0].fingerprint, independent_rows(self._roundings)),
        )

    def _measure_span(self, start: int, end: int) -> None:
        span = load_span(self._request.spec, start, end)
        stage = Stage(span, start, end, self._device)
        self._roundings.append(stage.rounding)
        hosted = HostedStage(stage, CALLER, CALLER, max_kv_tokens=None)
        with ModuleTimer(span, start, end, self._clock) as timer, self._power.measure():
            for rows in sorted({shape.rows for shape in self._request.shapes}):
                shapes = [shape for shape in self._request.shapes if shape.rows == rows]
                for shape in shapes:
                    if shape.tokens > 1:
                        self._repeat_shape(shape, self._request.num_prefills, self._make_prefill(hosted, timer, shape))
                decode = self._make_decode(hosted, timer, rows)
                for shape in sorted(shapes, key=lambda shape: shape.context):
                    if shape.tokens == 1:
                        self._repeat_shape(shape, self._request.num_decodes, functools.partial(decode, shape))
                hosted.end_session(0)

    def _make_prefill(
        self, hosted: HostedStage, timer: ModuleTimer[Any], shape: MeasuredShape
    ) -> Callable[[], _Sample]:
        """Return a function that times one prefill, or a chunk of one behind others."""

        def step() -> _Sample:
            session = _TrialSession(hosted, self._request, shape.rows)
            return self._time_step(session, timer, shape)

        return step

    def _make_decode(
        self, hosted: HostedStage, timer: ModuleTimer[Any], rows: int
    ) -> Callable[[MeasuredShape], _Sample]:
        """Return a function that times one decode step, in a text that grows until it has no more positions."""
        session = _TrialSession(hosted, self._request, rows)
        limit = self._request.max_positions

        def step(shape: MeasuredShape) -> _Sample:
            nonlocal session
            keeps_text = hosted.stage.kept.keeps_any
            if not keeps_text or (limit is not None and session.num_tokens >= limit):
                session = _TrialSession(hosted, self._request, rows)
            return self._time_step(session, timer, shape)

        return step

    def _repeat_shape(self, shape: MeasuredShape, num_wanted: int, step: Callable[[], _Sample]) -> None:
        for sample in repeat_step(step, num_wanted):
            for part, seconds in sample.items():
                self._samples[part, shape].append(seconds)
        self._num_done += 1
        self._on_progress(self._num_done)

    def _time_step(self, session: _TrialSession, timer: ModuleTimer[Any], shape: MeasuredShape) -> _Sample:
        missing = shape.context - session.num_tokens
        if session.hosted.stage.kept.keeps_any:
            if missing > 0:
                session.run_step(missing)
            session.prepare_step(shape.tokens)
        else:  # such a model is given the whole text in each step
            session.prepare_step(shape.context + shape.tokens)
        if self._flushing is not None:
            self._flushing.sum()
        timer.clear()
        began = self._clock.mark()
        session.run_prepared()
        total_s = self._clock.seconds_between(began, self._clock.mark())
        layers_s, prologue_s, epilogue_s = timer.layers_s, timer.prologue_s, timer.epilogue_s
        rest_s = total_s - sum(layers_s) - prologue_s - epilogue_s
        stage = session.hosted.stage
        kinds = self._request.kind_of_layer[stage.start : stage.end]
        is_pair = len(kinds) >= self._least_layers
        *_, last_s = layers_s
        sample: _Sample = {}
        if is_pair or kinds[-1] not in self._paired:  # a single layer counts only if no pair ends with its kind
            sample[kinds[-1]] = last_s
        if is_pair:
            if len(set(kinds)) == 1:  # the first layer's extra time is a cost of the stage
                rest_s += layers_s[0] - last_s
            sample["stage"] = rest_s
        if stage.is_first:
            sample["prologue"] = prologue_s
        if stage.is_last:
            sample["epilogue"] = epilogue_s
        return sample


def repeat_step(step: Callable[[], _Sample], num_wanted: int) -> list[_Sample]:
    """Repeat a step, which returns its seconds by part: more often while they spread, less often if the step is long.

    The first run includes one-time costs of a new shape; it counts only if it is long, so that these hardly matter.
    """
    began_s = time.monotonic()
    samples = [step()]
    if time.monotonic() - began_s < _MAX_REPEAT_S:
        samples.clear()
    while len(samples) < 2 or (
        time.monotonic() - began_s < _MAX_REPEAT_S
        and (len(samples) < num_wanted or (len(samples) < _MAX_FACTOR * num_wanted and _is_spread(samples)))
    ):
        samples.append(step())
    return samples


def _is_spread(samples: list[_Sample]) -> bool:
    low, middle, high = statistics.quantiles([sum(sample.values()) for sample in samples], n=4, method="inclusive")
    return high - low > max(_MAX_SPREAD * middle, _NEGLIGIBLE_SPREAD_S)


class _TrialSession:
    """A session on one stage, with steps as in service: a prompt with its mask, then tokens that extend it."""

    def __init__(self, hosted: HostedStage, request: MeasureModel, rows: int) -> None:
        self.hosted = hosted
        self.num_tokens = 0
        self._request = request
        self._rows = rows
        self._number = 0
        self._pace = Pace(1, 1.0)  # no slowdown: the emulated clock is read instead
        config = read_config(request.spec).get_text_config(decoder=True)
        self._num_ids = min(_NUM_IDS, config.vocab_size)
        self._next: tuple[Step, tuple[Tensor, ...]] | None = None
        hosted.end_session(0)

    def prepare_step(self, num_new: int) -> None:
        """Make the next step, with token ids, or with hidden states as from a previous stage."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        stage, is_prompt = self.hosted.stage, self._number == 0
        parts, start, end = stage.span.parts, stage.start, stage.end
        states: tuple[Tensor, ...]
        if stage.is_first:
            states = (torch.randint(0, self._num_ids, (self._rows, num_new), generator=generator),)
        else:
            states = draw_states(parts, start, self._rows, num_new, generator, self.num_tokens)
        shortcuts = draw_shortcuts(parts, start, end, self._rows, num_new, generator)
        self.hosted.shortcuts.put(0, self._number, shortcuts)
        step = Step(
            model=0,
            plan_version=0,
            stage=0,
            session=0,
            number=self._number,
            keeps_kv=True,
            layout=stage.layout_before,
            mask=MaskMode.FULL if is_prompt else MaskMode.EXTEND if stage.kept.masks_past else MaskMode.NONE,
            positions=PositionMode.NONE,
            position_rows=0,
            logits_to_keep=1,
            edits=(),
            rope_reach=0,
            sent_us=0,
            timings=(),
        )
        mask = (torch.ones((self._rows, num_new), dtype=torch.long),) if is_prompt else ()
        self._next = step, (*states, *mask)
        self._number += 1
        self.num_tokens += num_new

    def run_prepared(self) -> None:
        """Run the prepared step."""
        assert self._next is not None
        self.hosted.run_step(*self._next, self._pace)

    def run_step(self, num_new: int) -> None:
        """Prepare a step and run it."""
        self.prepare_step(num_new)
        self.run_prepared()

"""Measures what the parts of a model cost here, with its real modules in their real shapes.

Knows stages, clocks and hooks; nothing of devices beyond its own, and nothing of plans.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lingualinked.device import CALLER
from lingualinked.model.architectures import read_config
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.loading import load_span
from lingualinked.model.memory import release_memory
from lingualinked.model.stage import Stage, accelerator_device
from lingualinked.protocol.measuring import MeasuredStep, MeasureModel, StepShape
from lingualinked.protocol.messages import Step
from lingualinked.worker.hosted import HostedStage
from lingualinked.worker.pace import Pace

if TYPE_CHECKING:
    from lingualinked.model.loading import LoadedSpan

_FLUSH_BYTES = 64 << 20  # more than a processor's caches hold
_NUM_IDS = 64  # that tokens are chosen from, or all of a smaller vocabulary
_LONGEST_S = 1.0  # for repeating one shape, unless two steps take longer
_MOST_TIMES = 2  # as often as wanted, where times spread
_SPREAD = 0.25  # of a step's time between its quartiles, beyond which it is repeated further
_LEAST_SPREAD_S = 1e-4  # that does not matter

Part = str | int
"""What time is spent on: a kind of layer, or ``"prologue"``, ``"epilogue"``, ``"stage"`` (all the rest)."""

_Sample = dict[Part, float]
"""Seconds of one step by part."""


class Measurer:
    """Runs spans of a model and notes where their time goes.

    Weights are filled in, not read. Two layers run in a row and the second one counts: in a stage all but the first
    find their code at hand and their weights in memory, not in a cache.

    Parameters
    ----------
    request : MeasureModel
        What to measure.
    accelerator : str
        Where to compute.
    pace : Pace
        Whose clock to read.
    on_progress : callable
        Told how many shapes of all spans are measured.
    """

    def __init__(self, request: MeasureModel, accelerator: str, pace: Pace, on_progress: Callable[[int], None]) -> None:
        self._request = request
        self._accelerator = accelerator
        self._device = accelerator_device(accelerator)
        self._pace = pace
        self._on_progress = on_progress
        self._num_done = 0
        self._most_layers = max(end - start for start, end in request.spans)
        pairs = [end for start, end in request.spans if end - start == self._most_layers]
        self._paired = {request.kind_of_layer[end - 1] for end in pairs}
        self._samples: defaultdict[tuple[Part, StepShape], list[float]] = defaultdict(list)
        # Read before each step: in service, too, neither weights nor code wait in the processor's caches.
        self._flushing = torch.zeros(_FLUSH_BYTES // 4) if accelerator == "cpu" else None

    def run(self) -> dict[Part, tuple[MeasuredStep, ...]]:
        """Measure every span that the request names; give each part's times by shape."""
        with torch.inference_mode():
            for start, end in self._request.spans:
                self._measure_span(start, end)
                release_memory(self._accelerator)
        parts: defaultdict[Part, list[MeasuredStep]] = defaultdict(list)
        for (part, shape), seconds in self._samples.items():
            low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
            parts[part].append(MeasuredStep(shape=shape, seconds=max(middle, 0.0), spread_s=max(high - low, 0.0)))
        return {part: tuple(steps) for part, steps in parts.items()}

    def _measure_span(self, start: int, end: int) -> None:
        span = load_span(self._request.spec, start, end)
        stage = Stage(span, start, end, self._device)
        hosted = HostedStage(stage, CALLER, CALLER, max_kv_tokens=None)
        with _Stopwatch(span, start, end, self._clock) as watch:
            for rows in sorted({shape.rows for shape in self._request.shapes}):
                shapes = [shape for shape in self._request.shapes if shape.rows == rows]
                for shape in shapes:
                    if shape.tokens > 1:
                        self._repeat(shape, self._request.num_prefills, self._prefill(hosted, watch, shape))
                decode = self._decode(hosted, watch, rows)
                for shape in sorted(shapes, key=lambda shape: shape.context):
                    if shape.tokens == 1:
                        self._repeat(shape, self._request.num_decodes, functools.partial(decode, shape))
                hosted.end(0)

    def _prefill(self, hosted: HostedStage, watch: _Stopwatch, shape: StepShape) -> Callable[[], _Sample]:
        """Return what runs one prefill."""
        return lambda: self._step(_Session(hosted, self._request, shape.rows), watch, shape)

    def _decode(self, hosted: HostedStage, watch: _Stopwatch, rows: int) -> Callable[[StepShape], _Sample]:
        """Return what runs one decode step, in a text that grows with each as long as there are positions for it."""
        session = _Session(hosted, self._request, rows)
        limit = self._request.max_positions

        def step(shape: StepShape) -> _Sample:
            nonlocal session
            if limit is not None and session.num_tokens >= limit:
                session = _Session(hosted, self._request, rows)
            if shape.context > session.num_tokens:
                session.step(shape.context - session.num_tokens)
            return self._step(session, watch, shape)

        return step

    def _repeat(self, shape: StepShape, num_wanted: int, step: Callable[[], _Sample]) -> None:
        for sample in repeat_step(step, num_wanted):
            for part, seconds in sample.items():
                self._samples[part, shape].append(seconds)
        self._num_done += 1
        self._on_progress(self._num_done)

    def _step(self, session: _Session, watch: _Stopwatch, shape: StepShape) -> _Sample:
        session.prepare(shape.tokens)
        if self._flushing is not None:
            self._flushing.sum()
        watch.clear()
        began = self._clock()
        session.run()
        rest = self._clock() - began - watch.total
        stage = session.hosted.stage
        kinds = self._request.kind_of_layer[stage.start : stage.end]
        is_pair = len(kinds) == self._most_layers
        *_, last = watch.layers
        sample: _Sample = {}
        if (
            is_pair or kinds[-1] not in self._paired
        ):  # a lone layer is the first one, and counts where there is no other
            sample[kinds[-1]] = last
        if is_pair:
            if len(set(kinds)) == 1:  # what the first takes longer is the stage's cost, whatever its layers
                rest += watch.layers[0] - last
            sample["stage"] = rest
        if stage.is_first:
            sample["prologue"] = watch.prologue
        if stage.is_last:
            sample["epilogue"] = watch.epilogue
        return sample

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._pace.clock()


def repeat_step(step: Callable[[], _Sample], num_wanted: int) -> list[_Sample]:
    """Repeat a step, which tells its seconds by part: more often while they spread, less often where they are many.

    The first one shows what a new shape costs once, and does not count unless that is little of the whole.
    """
    began_s = time.monotonic()
    samples = [step()]
    if time.monotonic() - began_s < _LONGEST_S:
        samples.clear()
    while len(samples) < 2 or (
        time.monotonic() - began_s < _LONGEST_S
        and (len(samples) < num_wanted or (len(samples) < _MOST_TIMES * num_wanted and _is_spread(samples)))
    ):
        samples.append(step())
    return samples


def _is_spread(samples: list[_Sample]) -> bool:
    low, middle, high = statistics.quantiles([sum(sample.values()) for sample in samples], n=4, method="inclusive")
    return high - low > max(_SPREAD * middle, _LEAST_SPREAD_S)


class _Session:
    """A session on one stage, whose steps are those of service: prompt with its mask, then tokens that extend it."""

    def __init__(self, hosted: HostedStage, request: MeasureModel, rows: int) -> None:
        self.hosted = hosted
        self.num_tokens = 0
        self._request = request
        self._rows = rows
        self._number = 0
        self._pace = Pace(1, 1.0)  # nothing rests while it is measured
        self._dtype: torch.dtype = getattr(torch, request.spec.dtype)
        config = read_config(request.spec).get_text_config(decoder=True)
        self._num_ids = min(_NUM_IDS, config.vocab_size)
        self._next: tuple[Step, tuple[Tensor, ...]] | None = None
        hosted.end(0)

    def prepare(self, num_new: int) -> None:
        """Make the next step: token ids, or hidden states as the previous stage would give them."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        stage, is_prompt = self.hosted.stage, self._number == 0
        if stage.is_first:
            states = torch.randint(0, self._num_ids, (self._rows, num_new), generator=generator)
        else:
            shape = (self._rows, num_new, self._request.hidden_size)
            states = torch.randn(shape, generator=generator).to(self._dtype)
        step = Step(
            model=0,
            plan_version=0,
            stage=0,
            session=0,
            number=self._number,
            keeps_kv=True,
            layout=None if stage.is_first else self._request.layout,
            mask=MaskMode.FULL if is_prompt else MaskMode.EXTEND,
            positions=PositionMode.NONE,
            position_rows=0,
            logits_to_keep=1,
            edits=(),
            rope_reach=0,
            sent_us=0,
            timings=(),
        )
        mask = (torch.ones((self._rows, num_new), dtype=torch.long),) if is_prompt else ()
        self._next = step, (states, *mask)
        self._number += 1
        self.num_tokens += num_new

    def run(self) -> None:
        """Run the step that was prepared."""
        assert self._next is not None
        self.hosted.run(*self._next, self._pace)

    def step(self, num_new: int) -> None:
        """Prepare a step and run it."""
        self.prepare(num_new)
        self.run()


class _Stopwatch:
    """Notes the time spent in a span's layers, in its prologue and in its epilogue."""

    def __init__(self, span: LoadedSpan, start: int, end: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._hooks = contextlib.ExitStack()
        self.layers: list[float] = []
        self.prologue = self.epilogue = 0.0
        layers = span.model.get_submodule(span.parts.layers)
        assert isinstance(layers, nn.ModuleList)
        for layer in layers[start:end]:
            self._watch(layer, self.layers.append)
        for path in span.parts.prologue:
            self._watch(span.model.get_submodule(path), self._add_prologue)
        for path in span.parts.epilogue:
            self._watch(span.model.get_submodule(path), self._add_epilogue)

    @property
    def total(self) -> float:
        """All that was noted since `clear`."""
        return sum(self.layers) + self.prologue + self.epilogue

    def clear(self) -> None:
        """Begin anew."""
        self.layers.clear()
        self.prologue = self.epilogue = 0.0

    def _add_prologue(self, seconds: float) -> None:
        self.prologue += seconds

    def _add_epilogue(self, seconds: float) -> None:
        self.epilogue += seconds

    def _watch(self, module: nn.Module, note: Callable[[float], None]) -> None:
        began: list[float] = []

        def begin(_module: nn.Module, _arguments: Any) -> None:
            began.append(self._clock())

        def finish(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            note(self._clock() - began.pop())

        self._hooks.callback(module.register_forward_pre_hook(begin).remove)
        self._hooks.callback(module.register_forward_hook(finish).remove)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

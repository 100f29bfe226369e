"""Chooses in which chunks a prompt is predicted to take least time, and keeps to its choices.

Knows plans, profiles and the steps that have been recorded; not how chunks run.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.planning.prefill_prediction import StageCost, cost_of, predict_prefill

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.telemetry.samples import StepSample

logger = logging.getLogger("lingualinked.prefill")

_GRANULE = 64  # tokens: prompts up to the same multiple have the same chunks
_OVERHEAD_TOKENS = {"cpu": 16}  # that a chunk costs beside its own, where nothing has been measured
_OVERHEAD_ELSEWHERE = 1024  # on a GPU, which waits for the host


class ChunkSizes:
    """The chunks of a pipeline's prompts; equal prompts have equal chunks, and so equal bits, as long as the plan is the same."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._chosen: dict[tuple[object, ...], int] = {}

    def choose(self, num_rows: int, num_tokens: int) -> int:
        """Return the tokens of a chunk of a prompt."""
        num_tokens = -(-num_tokens // _GRANULE) * _GRANULE
        key = self._pipeline.plan.spans, num_rows, num_tokens
        if key not in self._chosen:
            self._chosen[key] = self._predict(num_rows, num_tokens)
        return self._chosen[key]

    def _predict(self, num_rows: int, num_tokens: int) -> int:
        stages, after_s, source = self._costs(num_rows)
        predicted = predict_prefill(stages, after_s, num_tokens, None)
        logger.debug("%s rows, %s, by %s", num_rows, predicted, source)
        return predicted.prefill_chunk_size

    def _costs(self, num_rows: int) -> tuple[list[StageCost], float, str]:
        """Return what the stages cost, what follows the last layer, and where that is known from."""
        plan, profile = self._pipeline.plan, self._pipeline.profile
        if profile is not None:
            from lingualinked.planning.predicting import prefill_costs  # imports NumPy

            return *prefill_costs(plan.stages, profile, num_rows), "the profile"
        times = stage_times(self._pipeline.latest_steps(), plan.spans, num_rows)
        if times is not None:
            return [StageCost(cost_of([(each, 1)], num_rows)) for each in times], 0.0, "the steps so far"
        devices = [self._pipeline.cluster.device(stage.device) for stage in plan.stages]
        overhead = max(_OVERHEAD_TOKENS.get(device.accelerator, _OVERHEAD_ELSEWHERE) for device in devices)
        layers = [stage.end - stage.start for stage in plan.stages]
        return [StageCost(functools.partial(_usual_cost, count, overhead)) for count in layers], 0.0, "what is usual"


def _usual_cost(num_layers: int, overhead: int, tokens: int, _context: int) -> float:
    return float(num_layers * (overhead + tokens))


def stage_times(
    steps: list[StepSample], spans: tuple[tuple[str, int, int], ...], num_rows: int
) -> list[ModuleTimes] | None:
    """Return what steps of so many rows took in each stage; None unless some had more tokens than others."""
    compute_s: defaultdict[tuple[int, int], list[tuple[float, ...]]] = defaultdict(list)
    for step in steps:
        if step.rows == num_rows and tuple((each.device, each.start, each.end) for each in step.stages) == spans:
            compute_s[step.tokens, step.context].append(tuple(each.compute_s for each in step.stages))
    if len({tokens for tokens, _ in compute_s}) < 2:
        return None
    medians = {
        shape: [statistics.median(seconds) for seconds in zip(*samples, strict=True)]
        for shape, samples in compute_s.items()
    }
    return [
        ModuleTimes(
            tuple(
                StepTime(rows=num_rows, tokens=tokens, context=context, seconds=seconds[index])
                for (tokens, context), seconds in medians.items()
            )
        )
        for index in range(len(spans))
    ]

"""Predicts what stages do under a workload, from what their parts cost.

Knows costs; no solver.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence

from lingualinked.device import CALLER
from lingualinked.planning.microbatches import exact_numbers
from lingualinked.planning.planned_stage import PlannedStage
from lingualinked.planning.prediction import (
    DevicePrediction,
    HopPrediction,
    Prediction,
    ShortcutPrediction,
    StagePrediction,
)
from lingualinked.planning.prefill_prediction import StageCost, cost_of, predict_prefill
from lingualinked.planning.transmission_map import consumed_by
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import Profile
from lingualinked.workload import Workload


def predict(stages: Sequence[PlannedStage], profile: Profile, workload: Workload, reserve: float) -> Prediction:
    """Predict what stages do, in pipeline order; in the best number of microbatches and in the best chunks, if they are not given."""
    if workload.prefill_chunk_size == "auto":
        rows = dataclasses.replace(workload, prefill_chunk_size=None).step_rows
        best = predict_prefill(*prefill_costs(stages, profile, rows), workload.prompt_tokens, None)
        whole = best.prefill_chunk_size >= workload.prompt_tokens
        workload = dataclasses.replace(workload, prefill_chunk_size=None if whole else best.prefill_chunk_size)

    def predict_split(number: int) -> Prediction:
        return _predict(stages, profile, dataclasses.replace(workload, num_microbatches=number), reserve)

    numbers = exact_numbers(profile, {stage.device for stage in stages}, workload)
    if workload.num_microbatches is not None or len(numbers) == 1:
        return _predict(stages, profile, workload, reserve)
    return min(map(predict_split, numbers), key=operator.attrgetter("interval_s"))


def _predict(stages: Sequence[PlannedStage], profile: Profile, workload: Workload, reserve: float) -> Prediction:
    costs, model = WorkloadCosts(profile, workload, reserve), profile.model
    predicted = []
    for stage in stages:
        device = profile.device(stage.device)
        predicted.append(
            StagePrediction(
                device=stage.device,
                start=stage.start,
                end=stage.end,
                chunks_s=costs.prefill_s(device, stage.start, stage.end),
                decode_s=costs.decode_s(device, stage.start, stage.end),
                weight_bytes=model.span_bytes(stage.start, stage.end),
                kv_bytes=costs.kv_bytes(stage.start, stage.end),
                working_bytes=costs.working_bytes(),
            )
        )
    names = [stage.device for stage in stages]
    hops = tuple(
        HopPrediction(
            source=source,
            target=target,
            latency_s=profile.link(source, target).latency_s,
            chunk_transfers_s=costs.prefill_transfer_s(source, target),
            decode_transfer_s=costs.transfer_s(source, target, 1),
        )
        for source, target in itertools.pairwise([CALLER, *names, CALLER])
    )
    devices = []
    for name in dict.fromkeys(names):
        hosted = [each for each in predicted if each.device == name]
        used = sum(stage.weight_bytes + stage.kv_bytes + stage.working_bytes for stage in hosted)
        if len(hosted) > 1:  # the first and the last: what is tied is held once
            used -= model.tied_bytes
        device = profile.device(name)
        devices.append(
            DevicePrediction(
                device=name,
                used_bytes=used,
                capacity_bytes=None if device.capacity_bytes == math.inf else int(device.capacity_bytes),
                busy_s=sum(costs.mean(stage.prefill_s, stage.decode_s) for stage in hosted)
                * (workload.num_microbatches or 1),
                watts=device.watts,
            )
        )
    return Prediction(
        workload=costs.workload,
        stages=tuple(predicted),
        hops=hops,
        devices=tuple(devices),
        shortcuts=tuple(_shortcuts(stages, costs)),
    )


def _shortcuts(stages: Sequence[PlannedStage], costs: WorkloadCosts) -> Iterator[ShortcutPrediction]:
    """Predict what each stage gets from stages on other devices, other than hidden states."""
    for index, consumed in enumerate(consumed_by(stages, costs.profile.model.transmission)):
        for source in dict.fromkeys(each.source for each in consumed if each.source is not None):
            parts = [each for each in consumed if each.source == source]
            names = stages[source].device, stages[index].device
            if names[0] != names[1]:
                token_bytes = sum(each.token_bytes for each in parts)
                yield ShortcutPrediction(
                    stage=index,
                    source=names[0],
                    target=names[1],
                    names=tuple(each.name for each in parts),
                    token_bytes=token_bytes,
                    chunk_transfers_s=tuple(
                        costs.shortcut_transfer_s(*names, token_bytes, tokens) for tokens, _ in costs.workload.chunks
                    ),
                    decode_transfer_s=costs.shortcut_transfer_s(*names, token_bytes, 1),
                )


def prefill_costs(stages: Sequence[PlannedStage], profile: Profile, rows: int) -> tuple[list[StageCost], float]:
    """Return what chunks of a prompt cost in each stage, and the seconds that follow the last layer, once."""
    costs = WorkloadCosts(profile, Workload(prompt_tokens=1, new_tokens=1, batch_size=rows), 0.0)
    result = []
    for source, stage in zip([CALLER, *(each.device for each in stages)], stages, strict=False):
        device, kinds = profile.device(stage.device), profile.model.kind_of_layer[stage.start : stage.end]
        parts = [(times, kinds.count(kind)) for kind, times in enumerate(device.layers) if kind in kinds]
        parts += [(device.stage, 1), *([(device.prologue, 1)] if stage.start == 0 else [])]
        link = 0.0 if source == stage.device else profile.link(source, stage.device).latency_s
        transfer_s = functools.partial(costs.transfer_s, source, stage.device)
        result.append(StageCost(cost_of(parts, rows), link, transfer_s))
    last = stages[-1].device
    return result, profile.device(last).epilogue.seconds(rows, 1, 0) + costs.hop_s(last, CALLER, 1)

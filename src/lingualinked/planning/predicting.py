"""Predicts what stages do under a workload, from what their parts cost.

Knows costs; no solver.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lingualinked.device import CALLER
from lingualinked.planning.planned_stage import PlannedStage
from lingualinked.planning.prediction import DevicePrediction, HopPrediction, Prediction, StagePrediction
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import Profile
from lingualinked.workload import Workload


def predict(stages: Sequence[PlannedStage], profile: Profile, workload: Workload, reserve: float) -> Prediction:
    """Predict what stages do, in pipeline order."""
    costs, model = WorkloadCosts(profile, workload, reserve), profile.model
    predicted = []
    for stage in stages:
        device = profile.device(stage.device)
        predicted.append(
            StagePrediction(
                device=stage.device,
                start=stage.start,
                end=stage.end,
                prefill_s=costs.prefill_s(device, stage.start, stage.end),
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
            prefill_transfer_s=costs.transfer_s(source, target, costs.workload.prompt_tokens),
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
                busy_s=sum(costs.mean(stage.prefill_s, stage.decode_s) for stage in hosted),
                watts=device.watts,
            )
        )
    return Prediction(workload=costs.workload, stages=tuple(predicted), hops=hops, devices=tuple(devices))

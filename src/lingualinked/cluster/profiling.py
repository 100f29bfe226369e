"""Asks the workers of a cluster to measure a model's parts and their links, and makes a profile of the answers.

Knows messages and plain data; neither transformers nor what a plan is.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from lingualinked.cluster.pending import results_of
from lingualinked.device import CALLER, Device, Link, link_between
from lingualinked.profile import DeviceProfile, LinkProfile, ModuleTimes, Profile, StepTime
from lingualinked.protocol.messages import LinkProbed, MeasuredStep, MeasureModel, ModelMeasured, ProbeLink, StepShape

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.model.footprint import Footprint
    from lingualinked.model.spec import ModelSpec
    from lingualinked.profile import ModelProfile
    from lingualinked.workload import Workload

_NUM_PREFILLS, _NUM_DECODES = 2, 6  # repeats that count; one more goes before them
_SMALL_BYTES, _LARGE_BYTES = 64, 256 << 10
_NUM_SMALL, _NUM_LARGE = 7, 3
_LONGEST_PROBE_S = 0.05  # that one large message may be on an imitated link
_MEASURING_BYTES = 64 << 20  # that measuring takes beside weights: buffers, results
_LIBRARIES = ("lingualinked", "torch", "transformers")


def library_versions() -> dict[str, str]:
    """Give the versions that a profile depends on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def profile_cluster(cluster: Cluster, spec: ModelSpec, footprint: Footprint, workload: Workload) -> Profile:
    """Measure a model on every device of a cluster, all at the same time, and then every link.

    What devices that are alike have measured is taken together, and so with links: with equal devices it is the
    machine's noise that differs.

    Parameters
    ----------
    cluster : Cluster
        Where to measure.
    spec : ModelSpec
        What to measure; its weights are not read.
    footprint : Footprint
        Its layers' kinds and bytes.
    workload : Workload
        Tells the shapes that matter.

    Returns
    -------
    Profile

    Raises
    ------
    WorkerError, WorkerDiedError, StepTimeoutError, ClosedError
        If a worker raised, ended, or did not answer.
    """
    cluster.wait()
    answers = _measure_models(cluster, spec, footprint, workload)
    groups: defaultdict[object, list[ModelMeasured]] = defaultdict(list)
    for device, answer in zip(cluster.devices, answers, strict=True):
        groups[_likeness(device, answer.hardware)].append(answer)
    num_on_cpu = sum(device.accelerator == "cpu" for device in cluster.devices)
    devices = []
    for device, answer in zip(cluster.devices, answers, strict=True):
        alike = groups[_likeness(device, answer.hardware)]
        share = num_on_cpu if device.accelerator == "cpu" else 1
        devices.append(_device_profile(device, alike, footprint.profile, answer.free_bytes // share))
    return Profile(
        model=footprint.profile,
        devices=tuple(devices),
        links=tuple(_measure_links(cluster)),
        versions=library_versions(),
    )


def step_shapes(workload: Workload, max_positions: int | None = None) -> tuple[StepShape, ...]:
    """Give the shapes of steps that a workload consists of: its prefill, and decode steps early and late in an answer.

    Each decode step is repeated, and every repeat lengthens the text: learned positions must suffice for all.
    """
    early, late = workload.prompt_tokens, workload.num_tokens
    if max_positions is not None:
        early = max(1, min(early, max_positions - 2 * (_NUM_DECODES + 1)))
        late = max(1, min(late, max_positions - (_NUM_DECODES + 1)))
    steps = [(max(2, workload.prompt_tokens), 0), *((1, context) for context in sorted({early, late}))]
    return tuple(
        StepShape(rows=rows, tokens=tokens, context=context)
        for rows in sorted({1, workload.batch_size})
        for tokens, context in steps
    )


def measured_spans(model: ModelProfile, memory_bytes: int | None) -> tuple[tuple[int, int], ...]:
    """Choose spans that show every kind of layer and both ends, within a memory limit.

    Two layers in a row show the kind of the second one; the last layer alone shows what comes after it.
    """
    num_layers = model.num_layers
    pairs = [(0, min(2, num_layers))]
    for kind in range(len(model.kinds)):
        if kind not in {model.kind_of_layer[end - 1] for _, end in pairs}:
            index = max(i for i, each in enumerate(model.kind_of_layer) if each == kind)
            pairs.append((max(0, index - 1), index + 1))
    spans = pairs if pairs[-1][1] == num_layers else [*pairs, (num_layers - 1, num_layers)]
    if memory_bytes is None:
        return tuple(spans)
    fitting = [span for span in spans if model.span_bytes(*span) + _MEASURING_BYTES <= memory_bytes]
    inner = (num_layers // 2, num_layers // 2 + 1)
    return tuple(fitting) or (inner,)


def _measure_models(cluster: Cluster, spec: ModelSpec, footprint: Footprint, workload: Workload) -> list[ModelMeasured]:
    model = footprint.profile
    blank = dataclasses.replace(spec, load_format="blank", files=())

    def request(device: Device) -> concurrent.futures.Future[object]:
        return cluster._engine.request(  # noqa: SLF001 - within the room
            device.name,
            lambda number: MeasureModel(
                request=number,
                spec=blank,
                spans=measured_spans(model, device.memory_bytes),
                kind_of_layer=model.kind_of_layer,
                shapes=step_shapes(workload, model.max_positions),
                num_prefills=_NUM_PREFILLS,
                num_decodes=_NUM_DECODES,
                layout=footprint.layout,
                hidden_size=footprint.hidden_size,
            ),
            "measuring a model's parts",
            cluster.timeout_s,
        )

    return cast("list[ModelMeasured]", results_of([request(device) for device in cluster.devices]))


def _likeness(device: Device, hardware: str) -> object:
    return device.accelerator.partition(":")[0], hardware, device.threads, device.slowdown, device.cpus is None


def _device_profile(
    device: Device, alike: Sequence[ModelMeasured], model: ModelProfile, free_bytes: int
) -> DeviceProfile:
    layers = [_times(answer.layers.get(kind, ()) for answer in alike) for kind in range(len(model.kinds))]
    layer_bytes = [model.layer_weight_bytes[model.kind_of_layer.index(kind)] for kind in range(len(model.kinds))]
    known = next(kind for kind, times in enumerate(layers) if times is not None)

    def estimated(num_bytes: int) -> ModuleTimes:
        """Estimate what its memory did not allow to measure: as a layer, in proportion to the bytes."""
        like = layers[known]
        assert like is not None
        share = num_bytes / layer_bytes[known]
        return ModuleTimes(
            tuple(
                dataclasses.replace(step, seconds=step.seconds * share, spread_s=step.spread_s) for step in like.steps
            )
        )

    return DeviceProfile(
        device=device,
        hardware=alike[0].hardware,
        layers=tuple(times or estimated(layer_bytes[kind]) for kind, times in enumerate(layers)),
        stage=_times(answer.stage for answer in alike) or estimated(0),
        prologue=_times(answer.prologue for answer in alike) or estimated(0),
        epilogue=_times(answer.epilogue for answer in alike) or estimated(model.epilogue_bytes),
        free_bytes=free_bytes,
    )


def _times(answers: Iterable[Sequence[MeasuredStep]]) -> ModuleTimes | None:
    """Take together what devices that are alike have measured; ``None`` if they have not."""
    by_shape: defaultdict[StepShape, list[MeasuredStep]] = defaultdict(list)
    for steps in answers:
        for step in steps:
            by_shape[step.shape].append(step)
    if not by_shape:
        return None
    return ModuleTimes(
        tuple(
            StepTime(
                rows=shape.rows,
                tokens=shape.tokens,
                context=shape.context,
                seconds=statistics.median(step.seconds for step in steps),
                spread_s=statistics.median(step.spread_s for step in steps),
            )
            for shape, steps in by_shape.items()
        )
    )


def _measure_links(cluster: Cluster) -> Iterator[LinkProfile]:
    """Probe every pair of parties, each party in one pair at a time.

    A link is taken to be as slow back as there, but for what is known to be imitated.
    """
    by_name: dict[str, Device | None] = {CALLER: None} | {device.name: device for device in cluster.devices}
    likeness = {
        (source, target): link_between(by_name[source], by_name[target], cluster.links)
        for source, target in itertools.permutations(by_name, 2)
    }
    latencies: defaultdict[Link, list[float]] = defaultdict(list)
    rates: defaultdict[Link, list[float]] = defaultdict(list)
    for pairs in _rounds(list(by_name)):
        probes, futures = [], []
        for source, target in pairs:
            prober, other = (target, source) if source == CALLER else (source, target)
            bandwidth = likeness[prober, other].bandwidth_bytes_per_s
            large = int(max(4 * _SMALL_BYTES, min(_LARGE_BYTES, bandwidth * _LONGEST_PROBE_S)))
            sizes = (_SMALL_BYTES,) * _NUM_SMALL + (large,) * _NUM_LARGE
            probes.append((prober, other, large))
            futures.append(_probe(cluster, prober, other, sizes))
        answers = cast("list[LinkProbed]", results_of(futures))
        for (prober, other, large), answer in zip(probes, answers, strict=True):
            seconds = answer.seconds
            small_s = statistics.median(seconds[1:_NUM_SMALL])  # the first one makes the connection
            large_s = statistics.median(seconds[_NUM_SMALL:])
            there, back = likeness[prober, other], likeness[other, prober]
            own_s = max(0.0, small_s - there.latency_s - back.latency_s) / 2
            for link in (there, back):
                latencies[link].append(own_s + link.latency_s)
            if large_s > small_s:
                rates[there].append((large - _SMALL_BYTES) / (large_s - small_s))
    for (source, target), link in likeness.items():
        stated = [] if link.bandwidth_bytes_per_s == math.inf else [link.bandwidth_bytes_per_s]
        measured = rates[link] or stated
        yield LinkProfile(
            source=source,
            target=target,
            latency_s=statistics.median(latencies[link]),
            bandwidth_bytes_per_s=statistics.median(measured) if measured else None,
        )


def _probe(cluster: Cluster, source: str, target: str, sizes: tuple[int, ...]) -> concurrent.futures.Future[object]:
    engine = cluster._engine  # noqa: SLF001 - within the room
    address, key = engine.peer(target)
    return engine.request(
        source,
        lambda number: ProbeLink(request=number, target=target, address=address, key=key, sizes=sizes),
        f"measuring the link to {target!r}",
        cluster.timeout_s,
    )


def _rounds(names: list[str]) -> Iterator[list[tuple[str, str]]]:
    """Give all pairs in rounds of disjoint ones, as in a tournament."""
    seats: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        yield [(left, right) for left, right in pairs if left is not None and right is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]

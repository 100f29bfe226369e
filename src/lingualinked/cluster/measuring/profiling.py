"""Asks the workers of a cluster to measure a model's parts, and makes a profile of the answers and of their links.

Knows messages and plain data; neither transformers nor what a plan is.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import msgspec

from lingualinked.cluster.measuring.doubt import OtherWork, find_doubt
from lingualinked.cluster.measuring.link_probing import all_pairs, measure_links
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.workers.remote_text import readable
from lingualinked.device import CALLER, Device
from lingualinked.environment import Environment
from lingualinked.errors import ArgumentError
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.profile import DeviceProfile, Profile
from lingualinked.protocol.measuring import MeasuredShape, MeasureModel, ModelMeasured

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.model.cutting.footprint import Footprint
    from lingualinked.profile import ModelProfile
    from lingualinked.rounding import Rounding
from lingualinked.workload import Workload

_NUM_PREFILLS, _NUM_DECODES = 5, 6  # repeats that count; one more goes before them
_NUM_CHUNKS, _LEAST_CHUNK = 8, 16  # of a prompt, whose first and last one are measured, and tokens of one
_MEASURING_BYTES = 64 << 20  # that measuring takes beside weights: buffers, results
_LIBRARIES = ("lingualinked", "torch", "transformers")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a profile depends on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def profile_devices(
    cluster: Cluster,
    devices: Sequence[Device],
    footprint: Footprint,
    workload: Workload,
    on_progress: Callable[[str, int], None],
) -> Profile:
    """Measure a model on devices of a cluster, all at the same time, and then every link between them and the caller.

    What equal devices of one machine have measured is taken together, since it is the machine's noise that differs, and
    so with links within a machine. ``on_progress`` is told a device's name and how many of its `num_measurements` are
    done, on the cluster's I/O thread.
    """
    for device in devices:
        cluster._engine.wait_for_worker(device.name, cluster.timeout_s)  # noqa: SLF001 - within the room
    environments = cluster._engine.environments()  # noqa: SLF001 - within the room
    machines = {name: each.machine for name, each in environments.items()}
    here = [device.name for device in devices if machines[device.name] == machines[CALLER]]
    with OtherWork(pid for name, pid in cluster.pids.items() if name in here) as others:
        answers = measure_models(cluster, devices, footprint, workload, on_progress)
    groups: defaultdict[object, list[ModelMeasured]] = defaultdict(list)
    free: defaultdict[object, list[int]] = defaultdict(list)  # a worker that answers early may not see what others take
    for device, answer in zip(devices, answers, strict=True):
        groups[_likeness(cluster.as_it_behaves(device), answer.hardware, machines[device.name])].append(answer)
        free[machines[device.name], device.accelerator].append(answer.free_bytes)
    measured = []
    for device, answer in zip(devices, answers, strict=True):
        machine = machines[device.name]
        alike = groups[_likeness(cluster.as_it_behaves(device), answer.hardware, machine)]
        beside = [each for each in devices if machines[each.name] == machine]
        free_bytes = share_of_memory(device, beside, min(free[machine, device.accelerator]))
        measured.append(_device_profile(device, alike, footprint.profile, free_bytes, environments[device.name]))
    names = [device.name for device in devices]
    return Profile(
        model=footprint.profile,
        devices=tuple(measured),
        links=measure_links(cluster, all_pairs([CALLER, *names])),
        versions=library_versions(),
        doubt=find_doubt(footprint.profile, measured, here, others.num_cores),
    )


def extend_profile(
    cluster: Cluster, footprint: Footprint, profile: Profile, device_name: str, workload: Workload
) -> Profile:
    """Measure a model on one more device, and the links between it and those that a profile has.

    No other device measures anything; what they are doing goes on. As in `profile_devices`, what devices or links that are
    alike have measured is taken together, and what the profile has of such counts; that itself stays as it is.
    """
    if profile.model != footprint.profile:
        raise ArgumentError("the profile is of another model than the one to measure: profile that one first")
    if device_name in profile.names:
        raise ArgumentError(f"device {device_name!r} is in the profile already: leave it out with without()")
    device = cluster.device(device_name)
    others = [cluster.device(name) for name in profile.names]
    for each in (device, *others):
        cluster._engine.wait_for_worker(each.name, cluster.timeout_s)  # noqa: SLF001 - within the room
    (answer,) = measure_models(cluster, [device], footprint, workload, lambda _device, _num_done: None)
    environments = cluster._engine.environments()  # noqa: SLF001 - within the room
    machine = environments[device_name].machine
    beside = [each for each in others if environments[each.name].machine == machine]
    likeness = _likeness(cluster.as_it_behaves(device), answer.hardware, machine)
    known = [
        each
        for each in map(profile.device, [each.name for each in beside])
        if _likeness(each.device, each.hardware, machine) == likeness
    ]
    alike = [answer, *map(_as_measured, known)]
    free_bytes = share_of_memory(device, [device, *beside], answer.free_bytes)
    measured = _device_profile(device, alike, footprint.profile, free_bytes, environments[device_name])
    pairs = [(device_name, other) for other in (CALLER, *profile.names)]
    return dataclasses.replace(
        profile,
        devices=(*profile.devices, measured),
        links=(*profile.links, *measure_links(cluster, pairs, profile.links)),
    )


def step_shapes(workload: Workload, max_positions: int | None = None) -> tuple[MeasuredShape, ...]:
    """Return the shapes of steps that a workload consists of: its prefill, and decode steps early and late in an answer.

    Of a prefill in chunks, the first and the last are added, if a chunk of an eighth is long enough to be measured. The last token
    of a text needs a position as well: where they are learned, one must be left for it.
    """
    early, late = workload.prompt_tokens, workload.num_tokens
    if max_positions is not None:
        late = min(late, max_positions - 1)
    steps = [(max(2, workload.prompt_tokens), 0), *((1, context) for context in sorted({early, late}))]
    chunk = workload.prompt_tokens // _NUM_CHUNKS
    if chunk >= _LEAST_CHUNK:
        steps += [(chunk, 0), (chunk, workload.prompt_tokens - chunk)]
    return tuple(
        MeasuredShape(rows=rows, tokens=tokens, context=context)
        for rows in sorted({1, workload.batch_size})
        for tokens, context in steps
    )


def measured_spans(model: ModelProfile, memory_bytes: int | None) -> tuple[tuple[int, int], ...]:
    """Choose spans that show every kind of layer and both ends, within a memory limit.

    Two layers in a row show the kind of the second one; the last layer alone shows what comes after it. Where the model forbids
    a cut, a span begins at the next earlier layer that may be the first of a stage.
    """
    num_layers, forbidden = model.num_layers, model.transmission.forbidden_cuts

    def first_before(layer: int) -> int:
        return max(each for each in range(layer + 1) if each not in forbidden)

    pairs = [(0, min(2, num_layers))]
    for kind in range(len(model.kinds)):
        if kind not in {model.kind_of_layer[end - 1] for _, end in pairs}:
            index = max(i for i, each in enumerate(model.kind_of_layer) if each == kind)
            pairs.append((first_before(max(0, index - 1)), index + 1))
    spans = pairs if pairs[-1][1] == num_layers else [*pairs, (first_before(num_layers - 1), num_layers)]
    if memory_bytes is None:
        return tuple(spans)
    fitting = [span for span in spans if model.span_bytes(*span) + _MEASURING_BYTES <= memory_bytes]
    inner = (first_before(num_layers // 2), num_layers // 2 + 1)
    return tuple(fitting) or (inner,)


def num_measurements(device: Device, model: ModelProfile, workload: Workload) -> int:
    """Count what a device measures: every shape in every span."""
    return len(measured_spans(model, device.memory_bytes)) * len(step_shapes(workload, model.max_positions))


def measure_models(
    cluster: Cluster,
    devices: Sequence[Device],
    footprint: Footprint,
    workload: Workload,
    on_progress: Callable[[str, int], None],
) -> list[ModelMeasured]:
    """Make devices measure a model's parts in the shapes of a workload, all at the same time."""
    model = footprint.profile
    workload = model.fit_workload(workload)
    blank = dataclasses.replace(footprint.spec, load_format="blank", files=())

    def request(device: Device) -> concurrent.futures.Future[object]:
        engine = cluster._engine  # noqa: SLF001 - within the room
        return engine.request(
            device.name,
            MeasureModel(
                request=engine.next_request(),
                spec=blank,
                spans=measured_spans(model, device.memory_bytes),
                kind_of_layer=model.kind_of_layer,
                shapes=step_shapes(workload, model.max_positions),
                num_prefills=_NUM_PREFILLS,
                num_decodes=_NUM_DECODES,
                max_positions=model.max_positions,
            ),
            "measuring a model's parts",
            cluster.timeout_s,
            functools.partial(on_progress, device.name),
        )

    answers = cast("list[ModelMeasured]", results_of([request(device) for device in devices]))
    return [
        msgspec.structs.replace(
            each, hardware=readable(each.hardware), power_source=readable(each.power_source)
        )  # they are shown as they are from here on
        for each in answers
    ]


def _likeness(device: Device, hardware: str, machine: str) -> object:
    return machine, device.accelerator.partition(":")[0], hardware, device.threads, device.slowdown, device.cpus is None


def share_of_memory(device: Device, devices: Sequence[Device], free_bytes: int) -> int:
    """Return how much of the free memory of a processor or GPU is for one of the devices of a machine that share it.

    What others may hold by their limits is not; if there is less than all limits together, each gets the same part of its
    own. What limits leave is shared equally by the devices without one.
    """
    sharing = [each for each in devices if each.accelerator == device.accelerator]
    claimed = sum(each.memory_bytes or 0 for each in sharing)
    own = device.memory_bytes
    if own is not None:
        return free_bytes * own // claimed if claimed > free_bytes else free_bytes - (claimed - own)
    return max(0, free_bytes - claimed) // sum(each.memory_bytes is None for each in sharing)


def _as_measured(known: DeviceProfile) -> ModelMeasured:
    """Put what a profile has of a device into the words in which its worker said it."""
    return ModelMeasured(
        request=0,
        hardware=known.hardware,
        free_bytes=known.free_bytes or 0,
        layers=dict(enumerate(known.layers)),
        stage=known.stage,
        prologue=known.prologue,
        epilogue=known.epilogue,
        watts=known.measured_watts,
        power_source=known.power_source,
        rounding=known.rounding or Rounding("", 0),
    )


def _device_profile(
    device: Device, alike: Sequence[ModelMeasured], model: ModelProfile, free_bytes: int, environment: Environment
) -> DeviceProfile:
    layers = [_times(answer.layers.get(kind) for answer in alike) for kind in range(len(model.kinds))]
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

    watts = [answer.watts for answer in alike if answer.watts is not None]
    sources = [answer.power_source for answer in alike if (answer.watts is None) == (not watts)]
    return DeviceProfile(
        device=device,
        hardware=alike[0].hardware,
        layers=tuple(times or estimated(layer_bytes[kind]) for kind, times in enumerate(layers)),
        stage=_times(answer.stage for answer in alike) or estimated(0),
        prologue=_times(answer.prologue for answer in alike) or estimated(0),
        epilogue=_times(answer.epilogue for answer in alike) or estimated(model.epilogue_bytes),
        free_bytes=free_bytes,
        measured_watts=statistics.median(watts) if watts else None,
        power_source=sources[0],
        environment=environment,
        rounding=alike[0].rounding,
    )


def _times(answers: Iterable[ModuleTimes | None]) -> ModuleTimes | None:
    """Combine the times that like devices have measured; ``None`` if there are none."""
    by_shape: defaultdict[tuple[int, int, int], list[StepTime]] = defaultdict(list)
    for times in answers:
        for step in () if times is None else times.steps:
            by_shape[step.rows, step.tokens, step.context].append(step)
    if not by_shape:
        return None
    combined = (
        dataclasses.replace(
            steps[0],
            seconds=statistics.median(step.seconds for step in steps),
            spread_s=statistics.median(step.spread_s for step in steps),
        )
        for steps in by_shape.values()
    )
    return ModuleTimes(tuple(combined))

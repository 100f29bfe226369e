"""Asks workers to load the stages of a route.

Knows routes and the message; neither when stages are loaded nor what runs in them.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterator

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.weights.file_supplies import FileLoad, arrange_supplies
from lingualinked.device import CALLER
from lingualinked.model.spec import ModelSpec
from lingualinked.protocol.messages import LoadStage, ShortcutTarget, WeightHolder


def request_stages(
    engine: Engine,
    model: int,
    spec: ModelSpec,
    route: Route,
    timeout_s: float,
    *,
    max_kv_tokens: int | None,
    on_progress: Callable[[str, int], None] | None = None,
    held: Route | None = None,
) -> list[concurrent.futures.Future[object]]:
    """Ask workers to load the stages of a route; return the futures of each stage's `StageLoaded`.

    ``on_progress`` is told a device's name and the bytes that it has loaded so far, on the I/O thread. The stages of
    ``held`` hold the weights already, for workers that can't read them from files.
    """
    helpers = () if held is None else held.stage_devices
    ends = (CALLER, *route.stage_devices, CALLER)
    # 1) for workers that can't read the caller's files: find out what they lack, and who sends it to them
    loads = [
        FileLoad(number=engine.next_request(), device=stage.device, start=stage.start, end=stage.end)
        for stage in route.plan.stages
    ]
    supplies = arrange_supplies(engine, spec, loads, timeout_s, is_move=held is not None)
    # 2) ask all workers at once
    futures = []
    for index, (stage, load) in enumerate(zip(route.plan.stages, loads, strict=True)):
        message = LoadStage(
            request=load.number,
            model=model,
            plan_version=route.version,
            stage=index,
            spec=supplies.spec if load.number in supplies.of_load else spec,
            start=stage.start,
            end=stage.end,
            previous_name=ends[index],
            next_name=ends[index + 2],
            max_kv_tokens=max_kv_tokens,
            num_stages=len(route.plan.stages),
            holders=() if held is None else tuple(_holders(engine, model, held, stage.device)),
            supplies=supplies.of_load.get(load.number, ()),
            shortcut_targets=_shortcut_targets(spec, route, index),
            shortcut_sources=tuple(
                (source, route.stage_devices[source])
                for source in range(index)
                if any(target.stage == index for target in _shortcut_targets(spec, route, source))
            ),
        )
        progress = None if on_progress is None else functools.partial(on_progress, stage.device)
        what = f"loading layers [{stage.start}, {stage.end})"
        if load.number in supplies.shared:
            engine.share_files(supplies.shared[load.number])
        futures.append(engine.request(stage.device, message, what, timeout_s, progress, helpers))
        if message.supplies:
            futures[-1].add_done_callback(functools.partial(_end_sharing, engine, load.number, tuple(supplies.shared)))
    return futures


def _shortcut_targets(spec: ModelSpec, route: Route, index: int) -> tuple[ShortcutTarget, ...]:
    """Return the later stages that use what a stage makes."""
    stages = route.plan.stages
    made = range(stages[index].start, stages[index].end)
    found = []
    for later in range(index + 1, len(stages)):
        start, end = stages[later].start, stages[later].end
        shortcuts = () if spec.parts is None else spec.parts.transmission.shortcuts
        names = tuple(
            each.name for each in shortcuts if each.made_at in made and each.is_sent_to(start, end, stages[-1].end)
        )
        if names:
            found.append(ShortcutTarget(stage=later, name=stages[later].device, shortcuts=names))
    return tuple(found)


def _end_sharing(
    engine: Engine, load: int, all_loads: tuple[int, ...], loaded: concurrent.futures.Future[object]
) -> None:
    """End the sharing of files for a stage that is loaded; for all of its route if it failed, since none is of use then."""
    for number in (load,) if loaded.exception() is None else all_loads:
        engine.end_sharing(number)


def _holders(engine: Engine, model: int, route: Route, borrower: str) -> Iterator[WeightHolder]:
    for index, stage in enumerate(route.plan.stages):
        yield WeightHolder(
            name=stage.device,
            model=model,
            plan_version=route.version,
            stage=index,
            start=stage.start,
            end=stage.end,
            lends=engine.may_lend(stage.device, borrower),
        )

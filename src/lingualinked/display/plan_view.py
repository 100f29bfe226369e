"""Formats plans, predictions and comparisons as tables, and draws plans.

Knows plans; not how they are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lingualinked.display.figure import new_figure
from lingualinked.display.palette import KV, LIMITING, PLAIN, WEIGHTS, WORKING
from lingualinked.display.profile_view import doubt_notes
from lingualinked.planning.comparison import Comparison
from lingualinked.planning.plan import Plan
from lingualinked.planning.prediction import Prediction
from lingualinked.profile import Profile
from lingualinked.quantities import bytes_text, count_text, seconds_text
from lingualinked.tables import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan_rows(plan: Plan) -> Rows:
    """Make a table of a plan: devices, stages, layers, bytes, and predicted times."""
    exact = "exact" if plan.exact else f"not exact: {plan.inexact_because}"
    title = f"Plan: {count_text(plan.num_layers, 'layer')} in {count_text(len(plan.stages), 'stage')} ({exact})"
    if plan.profile is None:
        largest = max(stage.weight_bytes for stage in plan.stages) or 1
        return Rows(
            title=title,
            columns=("device", "stage", "layers", "number", "weights"),
            rows=[
                (*_place(index, stage), bytes_text(stage.weight_bytes) if stage.weight_bytes else "?")
                for index, stage in enumerate(plan.stages)
            ],
            bars=[stage.weight_bytes / largest for stage in plan.stages],
        )
    predicted = plan.predicted
    left = {device.device: device.left_bytes for device in predicted.devices}
    slowest = max(stage.decode_s for stage in predicted.stages)
    return Rows(
        title=title,
        columns=("device", "stage", "layers", "number", "weights", "KV", "left", "prefill", "decode"),
        rows=[
            (
                *_place(index, stage),
                bytes_text(stage.weight_bytes),
                bytes_text(stage.kv_bytes),
                "no limit" if (bytes_left := left[stage.device]) is None else bytes_text(bytes_left),
                seconds_text(stage.prefill_s),
                seconds_text(stage.decode_s),
            )
            for index, stage in enumerate(predicted.stages)
        ],
        bars=[stage.decode_s / slowest if slowest else 0.0 for stage in predicted.stages],
        notes=[*_host_notes(plan.profile), *predicted.lines, *_solver_notes(plan), *doubt_notes(plan.profile)],
    )


def comparison_rows(comparison: Comparison) -> Rows:
    """Make a table that compares plans, with ratios to the first plan."""
    figures = (
        ("for the workload, tokens/s", "tokens_per_s"),
        ("full pipeline, tokens/s", "pipeline_tokens_per_s"),
        ("one stream, tokens/s", "stream_tokens_per_s"),
        ("decode step, ms", "step_s"),
        ("first token, ms", "first_token_s"),
    )
    rows = []
    for title, figure in figures:
        scale = 1e3 if figure.endswith("_s") and not figure.endswith("per_s") else 1.0
        values = [scale * getattr(prediction, figure) for prediction in comparison.predictions]
        ratios = comparison.ratios(figure)
        rows.append((title, *(f"{value:.1f} ({ratio:.2f})" for value, ratio in zip(values, ratios, strict=True))))
    rows.append(("limited by", *(prediction.limited_by for prediction in comparison.predictions)))
    return Rows(
        title=f"Comparison of plans; in parentheses, the ratio to {comparison.names[0]}",
        columns=("predicted", *comparison.names),
        rows=rows,
    )


def plan_figure(plan: Plan) -> Figure:
    """Draw a plan: layers on devices and, with a profile, each device's memory and time."""
    names = list(plan.devices) + list(plan.solved.unused if plan.solved else ())
    predicted = None if plan.profile is None else plan.predicted
    figure = new_figure(5 if predicted is None else 12.6, 1.9 + 0.45 * len(names))
    title = f"{count_text(plan.num_layers, 'layer')} on {count_text(len(plan.devices), 'device')}"
    figure.suptitle(title if predicted is None else f"{title}, limited by {predicted.limited_by}", fontsize=11)
    axes = figure.subplots(1, 1 if predicted is None else 3, sharey=True, squeeze=False)[0]
    for stage in plan.stages:
        axes[0].barh(stage.device, stage.num_layers, left=stage.start, color=PLAIN, edgecolor="white")
        axes[0].text(
            (stage.start + stage.end) / 2, stage.device, f"{stage.num_layers}", ha="center", va="center", color="white"
        )
    for name in names[len(plan.devices) :]:
        axes[0].barh(name, 0)
        axes[0].text(plan.num_layers / 2, name, "not used", ha="center", va="center", color="grey")
    axes[0].set(xlim=(0, plan.num_layers), xlabel="layer", title="layers")
    axes[0].invert_yaxis()
    if predicted is not None:
        _draw_memory(axes[1], predicted)
        _draw_time(axes[2], predicted)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_memory(axes: Any, predicted: Prediction) -> None:
    gibi = 1024**3
    scale, unit = (gibi, "GiB") if max(each.used_bytes for each in predicted.devices) > gibi else (1024**2, "MiB")
    left = dict.fromkeys((each.device for each in predicted.devices), 0.0)
    parts = (
        ("weights", "weight_bytes", WEIGHTS),
        ("KV cache", "kv_bytes", KV),
        ("working", "working_bytes", WORKING),
    )
    for label, field, colour in parts:
        names = [stage.device for stage in predicted.stages]
        for index, stage in enumerate(predicted.stages):
            width = getattr(stage, field) / scale
            axes.barh(names[index], width, left=left[stage.device], color=colour, label=None if index else label)
            left[stage.device] += width
    longest = max(left.values())
    limits = [
        (each.capacity_bytes / scale, each.device)
        for each in predicted.devices
        if each.capacity_bytes is not None and each.capacity_bytes / scale <= 3 * longest
    ]
    if limits:
        axes.plot(*zip(*limits, strict=True), linestyle="", marker="|", markersize=22, color="black", label="limit")
    axes.set(xlabel=unit, title="memory")
    _add_legend(axes)


def _draw_time(axes: Any, predicted: Prediction) -> None:
    for each in predicted.devices:
        colour = LIMITING if predicted.limited_by == f"device {each.device!r}" else PLAIN
        axes.barh(each.device, each.busy_s * 1e3, color=colour)
    axes.axvline(
        predicted.seconds_of(predicted.limited_by) * 1e3,
        color=LIMITING,
        linewidth=1,
        linestyle="--",
        label=f"{predicted.limited_by} limits",
    )
    axes.set(xlabel="ms of compute in a mean step", title="time")
    _add_legend(axes)


def _add_legend(axes: Any) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False, fontsize=8)


def _place(index: int, stage: Any) -> tuple[str, str, str, str]:
    return stage.device, str(index), f"[{stage.start}, {stage.end})", str(stage.end - stage.start)


def _host_notes(profile: Profile) -> list[str]:
    """Return a note that says where devices on other hosts are; none without such."""
    found = []
    for each in profile.devices:
        if each.device.address is not None:
            host = f" ({each.environment.host})" if each.environment is not None else ""
            found.append(f"{each.device.name} at {each.device.address}{host}")
    return [f"on other hosts: {', '.join(found)}"] if found else []


def _solver_notes(plan: Plan) -> list[str]:
    solved = plan.solved
    if solved is None:
        return []
    value, bound = (
        f"{each:.3g} J" if solved.objective == "energy" else seconds_text(each)
        for each in (solved.value, solved.lower_bound)
    )
    of = "between steps" if solved.objective == "throughput" else "a step"
    if solved.num_sessions is not None:
        of += f" with {count_text(solved.num_sessions, 'session')} in flight"
    notes = [f"{solved.objective}: {value} {of}; none is better than {bound} (gap {100 * solved.gap:.1f} %)"]
    if solved.unused:
        notes.append(f"not used: {', '.join(_left_out(plan))}")
    return notes


def _left_out(plan: Plan) -> list[str]:
    """Name the devices that a plan leaves out, and say from how many sessions on they would pay."""
    assert plan.solved is not None
    if plan.solved.objective != "throughput":
        return list(plan.solved.unused)
    from lingualinked.planning.left_out import sessions_to_pay  # imports scipy

    return [
        f"{name} (would not pay, however many sessions are in flight)"
        if number is None
        else f"{name} (would pay from {count_text(number, 'session')} in flight on)"
        for name, number in sessions_to_pay(plan).items()
        if name in plan.solved.unused
    ]

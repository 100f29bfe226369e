"""``lingualinked plan``: shows where the layers of a model should go, without loading it.

Knows the public API, saved profiles and cluster files; prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer
from rich.text import Text

import lingualinked as ll
from lingualinked.cli.devices_option import read_devices
from lingualinked.cli.output import check_picture
from lingualinked.console import new_console
from lingualinked.display.plan_view import plan_rows
from lingualinked.display.transmission_view import transmission_rows
from lingualinked.quantities import count_text
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.profiles.saved import check_devices, find_profile, saved_profile

if TYPE_CHECKING:
    from lingualinked.workload import Objective


def run_plan(
    path: str,
    devices: str,
    workload: ll.Workload,
    objective: Objective,
    *,
    knows_sessions: bool,
    as_json: bool,
    plot: Path | None,
    dtype: str,
    explain: bool,
    show_map: bool,
    progress: bool,
) -> None:
    """Print the plan, made from a saved profile, from stated specs, or from a measurement now."""
    if plot is not None:
        check_picture("--plot", plot)
    # 1) read, estimate or measure the profile
    profile = _find_or_estimate_profile(path, devices, workload, dtype, progress=progress)
    # 2) solve
    num_sessions: Literal["any"] | None = None if knows_sessions else "any"
    plan = ll.solve(profile, objective=objective, workload=workload, num_sessions=num_sessions)
    # 3) draw and print
    if plot is not None:
        try:
            plan.plot().savefig(plot, dpi=120)
        except (OSError, ValueError) as error:
            raise ll.ArgumentError(f"no picture can be written to --plot {str(plot)!r}: {error}") from error
    if as_json:
        print(plan.to_json())  # noqa: T201 - not the console's to wrap
        return
    console = new_console()
    console.print(plan_rows(plan))
    if show_map:
        console.print()
        console.print(transmission_rows(plan.transmission_map))
    if explain:
        console.print(Text(f"\n{plan.explain()}"))


def load_format_of(path: str) -> Literal["auto", "dummy"]:
    """Return "dummy" (random weights) for a folder that holds only a ``config.json``, else "auto"."""
    has_weights = any(Path(path).glob("*.safetensors")) or not Path(path).is_dir()
    return "auto" if has_weights else "dummy"


def _find_or_estimate_profile(
    path: str, devices: str, workload: ll.Workload, dtype: str, *, progress: bool
) -> ll.Profile:
    from lingualinked.cluster.workers.remote_hosts import remote_available_bytes  # imports torch
    from lingualinked.sharded.loading.describing import describe  # imports torch

    asked = read_devices(devices)
    described = describe(LoadArguments.of(path, dtype=dtype, load_format=load_format_of(path)))
    if asked.specs:
        silent = [device.name for device in asked.devices if device.name not in asked.specs]
        if silent:
            raise ll.ArgumentError(
                f"{devices} states flops and memory_bandwidth for {', '.join(asked.specs)} but not for "
                f"{', '.join(silent)}: state them for every device, or for none to measure all of them"
            )
        return described.estimate(asked.devices, asked.specs, asked.links, workload)
    footprint = described.footprint()
    workload = footprint.profile.fit_workload(workload)
    is_local = all(device.address is None for device in asked.devices)
    if is_local:  # of other hosts, nothing is known before their workers answer
        found = saved_profile(asked.devices, asked.links, footprint, workload, {})
        if found is not None:
            return found
        check_devices(footprint, asked.devices, asked.links, workload, {})
    if progress:
        typer.echo(_announcement(footprint.profile, asked.devices, workload), err=True)
    with ll.Cluster(asked) as cluster:
        if not is_local:
            check_devices(footprint, cluster.devices, cluster.links, workload, remote_available_bytes(cluster))
        return find_profile(cluster, footprint, workload, progress=progress)


def _announcement(model: ll.ModelProfile, devices: Sequence[ll.Device], workload: ll.Workload) -> str:
    """Return a text that says what will be measured, and how to avoid it."""
    kinds = count_text(len(model.kinds), "kind")
    return (
        f"Measuring {model.name} ({count_text(model.num_layers, 'layer')} of {kinds}, {model.dtype}) on "
        f"{', '.join(device.name for device in devices)}: a prefill of {count_text(workload.prompt_tokens, 'token')}, "
        f"decode steps after {workload.prompt_tokens:,} and {workload.num_tokens:,} tokens, and the links. The profile is kept on disk "
        "unless its times are doubtful.\n"
        "For an estimate without measuring, state flops and memory_bandwidth of every device in a cluster file "
        "(--devices cluster.toml)."
    )

"""``lingualinked plan``: where the layers of a model should go, without loading it.

Knows the public face, saved profiles and cluster files, and prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

import lingualinked as ll
from lingualinked.cli.cluster_file import read_devices
from lingualinked.cli.output import check_picture
from lingualinked.cluster.devices import as_devices
from lingualinked.display.console import new_console
from lingualinked.display.plan import plan_rows

if TYPE_CHECKING:
    from lingualinked.planning.plan import Objective


def run_plan(
    path: str,
    devices: str,
    workload: ll.Workload,
    objective: Objective,
    *,
    as_json: bool,
    plot: Path | None,
    dtype: str,
    explain: bool,
) -> None:
    """Print the plan, from a saved profile, from stated figures, or from a measurement made now."""
    if plot is not None:
        check_picture("--plot", plot)
    profile = _profile(path, devices, workload, dtype)
    plan = ll.solve(profile, objective=objective, workload=workload)
    if plot is not None:
        try:
            plan.plot().savefig(plot, dpi=120)
        except (OSError, ValueError) as error:
            raise ll.ArgumentError(f"no picture can be written to --plot {str(plot)!r}: {error}") from error
    if as_json:
        print(plan.to_json())  # noqa: T201 - not the console's to wrap
        return
    console = new_console()
    console.print(plan_rows(plan).to_rich())
    if explain:
        console.print(Text(f"\n{plan.explain()}"))


def _profile(path: str, devices: str, workload: ll.Workload, dtype: str) -> ll.Profile:
    from lingualinked.sharded.loading import LoadArguments, describe
    from lingualinked.sharded.profiling import saved_profile

    asked = read_devices(devices)
    has_weights = any(Path(path).glob("*.safetensors")) or not Path(path).is_dir()
    described = describe(LoadArguments.of(path, None, dtype=dtype, load_format="auto" if has_weights else "dummy"))
    if asked.figures:
        silent = [device.name for device in asked.devices if device.name not in asked.figures]
        if silent:
            raise ll.ArgumentError(
                f"{devices} states flops and memory_bandwidth for {', '.join(asked.figures)} and not for "
                f"{', '.join(silent)}: state them for every device, or for none to have all of them measured here"
            )
        return described.estimate(asked.devices, asked.figures, asked.links, workload)
    footprint = described.footprint()
    workload = footprint.profile.fit_workload(workload)
    found = saved_profile(as_devices(asked.devices), asked.links, footprint, workload)
    if found is not None:
        return found
    with ll.Cluster(asked.devices, links=asked.links) as cluster:
        from lingualinked.sharded.profiling import find_profile

        return find_profile(cluster, described.spec, footprint, workload)

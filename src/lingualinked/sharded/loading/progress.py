"""Progress bars while workers measure or load, in a terminal and in Jupyter.

Knows counts and device names only.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Mapping
from typing import Any, Self

from lingualinked.planning.plan import Plan


class DeviceProgress:
    """One progress bar per device, with tqdm's ``options``; a context manager. A total of 0 is unknown."""

    def __init__(
        self, titles: Mapping[str, str], totals: Mapping[str, int], options: Mapping[str, Any], *, shown: bool
    ) -> None:
        self._lock = threading.Lock()
        self._bars: dict[str, Any] = {}
        if not shown:
            return
        tqdm = _tqdm()
        for position, (device, title) in enumerate(titles.items()):
            self._bars[device] = tqdm(
                total=totals[device] or None, desc=title, position=position, leave=True, **options
            )

    @classmethod
    def of_loading(cls, plan: Plan, *, shown: bool) -> Self:
        """Make bars for the bytes that each device of a plan has loaded."""
        layers = {
            device: " ".join(f"[{stage.start}, {stage.end})" for stage in plan.stages if stage.device == device)
            for device in plan.devices
        }
        totals = {
            device: sum(stage.weight_bytes for stage in plan.stages if stage.device == device)
            for device in plan.devices
        }
        titles = {device: f"{device} {spans}" for device, spans in layers.items()}
        return cls(titles, totals, {"unit": "B", "unit_scale": True, "unit_divisor": 1024}, shown=shown)

    @classmethod
    def of_measuring(cls, totals: Mapping[str, int], *, shown: bool) -> Self:
        """Make bars for the number of kinds of steps that each device has measured."""
        return cls({device: f"measuring {device}" for device in totals}, totals, {"unit": "step"}, shown=shown)

    def update(self, device: str, num_done: int) -> None:
        """Show the count of a device."""
        bar = self._bars.get(device)
        if bar is not None:
            with self._lock:
                # What is fetched may take more bytes than what is loaded: its dtype is the checkpoint's.
                bar.update((num_done if bar.total is None else min(num_done, bar.total)) - bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for bar in self._bars.values():
            if kind is None and bar.total is not None:  # tensors that are not read (ties, buffers) are not reported
                bar.update(bar.total - bar.n)
            bar.close()


def _tqdm() -> Any:
    """Return the class of bars: Jupyter's if its widgets are installed, else the plain one."""
    try:
        from IPython import get_ipython

        in_notebook = get_ipython() is not None and "IPKernelApp" in get_ipython().config
    except ImportError:
        in_notebook = False
    name = "notebook" if in_notebook and importlib.util.find_spec("ipywidgets") is not None else "std"
    tqdm = importlib.import_module(f"tqdm.{name}").tqdm
    # In the log of a batch job a plain bar would fill line after line, so it is shown in a terminal only.
    return tqdm if in_notebook else functools.partial(tqdm, disable=None)

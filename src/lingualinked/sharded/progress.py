"""Progress bars while workers load, in a terminal and in Jupyter.

Knows byte counts and device names only.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from types import TracebackType
from typing import Any, Self

from lingualinked.planning.plan import Plan


class LoadProgress:
    """One bar per device that loads; a context manager.

    Parameters
    ----------
    plan : Plan
        What each device will have loaded.
    shown : bool
        Whether to draw anything.
    """

    def __init__(self, plan: Plan, *, shown: bool) -> None:
        self._lock = threading.Lock()
        self._bars: dict[str, Any] = {}
        if not shown:
            return
        tqdm = _tqdm()
        for position, device in enumerate(plan.devices):
            layers = [f"[{stage.start}, {stage.end})" for stage in plan.stages if stage.device == device]
            total = sum(stage.weight_bytes for stage in plan.stages if stage.device == device)
            self._bars[device] = tqdm(
                total=total or None,
                desc=f"{device} {' '.join(layers)}",
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                position=position,
                leave=True,
            )

    def update(self, device: str, num_bytes: int) -> None:
        """Take the bytes that a device has loaded so far."""
        bar = self._bars.get(device)
        if bar is not None:
            with self._lock:
                bar.update(num_bytes - bar.n)

    def finish(self) -> None:
        """Fill every bar: tensors made rather than read (ties, buffers) are not reported."""
        for bar in self._bars.values():
            if bar.total is not None:
                bar.update(bar.total - bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        for bar in self._bars.values():
            bar.close()


def _tqdm() -> Any:
    """Jupyter's bar where its widgets are installed, else the plain one."""
    try:
        from IPython import get_ipython

        in_notebook = get_ipython() is not None and "IPKernelApp" in get_ipython().config
    except ImportError:
        in_notebook = False
    name = "notebook" if in_notebook and importlib.util.find_spec("ipywidgets") is not None else "std"
    tqdm = importlib.import_module(f"tqdm.{name}").tqdm
    # In the log of a batch job a plain bar would be line after line: it shows itself in a terminal alone.
    return tqdm if in_notebook else functools.partial(tqdm, disable=None)

"""Tells the workers of a cluster which devices and links they emulate, when that changes.

Knows in which order they have to know it; not why it changes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lingualinked.cluster.messaging.pending import result_of, results_of
from lingualinked.cluster.workers.emulation import delayed_from, emulated_link, emulation_of
from lingualinked.device import CALLER, Device, Links
from lingualinked.errors import WorkerDiedError
from lingualinked.protocol.boot import Emulation

if TYPE_CHECKING:
    from lingualinked.cluster.messaging.engine import Engine


def announce_device(
    engine: Engine, others: Iterable[str], behaving: Mapping[str, Device], links: Links, timeout_s: float
) -> None:
    """Tell every living worker about the link to a new one."""
    told = []
    for other in others:
        with contextlib.suppress(WorkerDiedError):
            engine.wait_for_worker(other, timeout_s)
        emulation = emulation_of(other, behaving, links)
        told.append(_emulate(engine, other, emulation, "the announcement of a new device", timeout_s))
    while told:
        with contextlib.suppress(WorkerDiedError):
            result_of(told.pop(0))


def change_behaviour(
    engine: Engine,
    name: str,
    before: Mapping[str, Device],
    behaving: Mapping[str, Device],
    links: Links,
    timeout_s: float,
) -> None:
    """Make one worker, and the links from and to it, behave otherwise than before; the others are as they were."""
    engine.expect_delays(delayed_from(CALLER, behaving, links))
    # 1) all know from whom messages may come delayed; 2) they come so
    for now, later in ((before, behaving), (behaving, None)):
        results_of(
            [
                _emulate(engine, each, emulation_of(each, now, links, later), "a change of pace", timeout_s)
                for each in behaving
            ]
        )
    engine.shape_link(name, emulated_link(None, behaving[name], links))


def _emulate(
    engine: Engine, name: str, emulation: Emulation, what: str, timeout_s: float
) -> concurrent.futures.Future[object]:
    from lingualinked.protocol.messages import EmulateDevice  # imports torch

    message = EmulateDevice(request=engine.next_request(), emulation=emulation)
    return engine.request(name, message, what, timeout_s)

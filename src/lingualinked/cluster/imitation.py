"""What workers are told so that they behave as slower devices on slower links.

Knows devices, links and the words for it; not when it is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lingualinked.device import CALLER, Device, Links, link_between
from lingualinked.protocol.boot import Imitation, LinkFigures

if TYPE_CHECKING:
    from lingualinked.protocol.messages import Imitate


def imitation_of(name: str, devices: Mapping[str, Device], links: Links) -> Imitation:
    """Say what a device's worker imitates among all devices of a cluster and the caller."""
    device = devices[name]
    figures = []
    for target, other in {CALLER: None, **devices}.items():
        if target != name:
            link = link_between(device, other, links)
            bandwidth = link.bandwidth_bytes_per_s
            figures.append(
                LinkFigures(
                    target=target,
                    bandwidth_bytes_per_s=None if bandwidth == math.inf else bandwidth,
                    latency_s=link.latency_s,
                )
            )
    return Imitation(slowdown=device.slowdown, links=tuple(figures))


def imitate(name: str, devices: Mapping[str, Device], links: Links) -> Callable[[int], Imitate]:
    """Return what makes the message, from a request number, that tells a running worker so."""
    from lingualinked.protocol.messages import Imitate

    imitation = imitation_of(name, devices, links)
    return lambda number: Imitate(request=number, imitation=imitation)

"""What workers are told so that they behave as slower devices on slower links.

Knows devices, links and the words for it; not when it is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lingualinked.device import CALLER, Device, Link, Links, link_between
from lingualinked.protocol.boot import EmulatedLink, Emulation


def delayed_from(name: str, devices: Mapping[str, Device], links: Links) -> tuple[str, ...]:
    """List the parties whose messages to a device, or to the caller, go through an emulated link."""
    parties: dict[str, Device | None] = {CALLER: None, **devices}
    return tuple(
        source
        for source, other in parties.items()
        if source != name and not _is_plain(emulated_link(other, parties[name], links))
    )


def emulated_link(source: Device | None, target: Device | None, links: Links) -> Link:
    """Return the link to emulate from one device to another, or from or to the caller (``None``).

    A link to or from a device on another host is as it is: what is stated of it serves plans only.
    """
    is_real = any(end is not None and end.address is not None for end in (source, target))
    return Link() if is_real else link_between(source, target, links)


def _is_plain(link: Link) -> bool:
    return link.bandwidth_bytes_per_s == math.inf and not link.latency_s


def emulation_of(
    name: str, devices: Mapping[str, Device], links: Links, later: Mapping[str, Device] | None = None
) -> Emulation:
    """Say what a device's worker emulates among all devices of a cluster and the caller, as they are, or will be later."""
    device = devices[name]
    emulated_links = []
    for target, other in {CALLER: None, **devices}.items():
        if target != name:
            link = emulated_link(device, other, links)
            bandwidth = link.bandwidth_bytes_per_s
            emulated_links.append(
                EmulatedLink(
                    target=target,
                    bandwidth_bytes_per_s=None if bandwidth == math.inf else bandwidth,
                    latency_s=link.latency_s,
                )
            )
    expected = dict.fromkeys((*delayed_from(name, devices, links), *delayed_from(name, later or devices, links)))
    return Emulation(slowdown=device.slowdown, links=tuple(emulated_links), delayed_from=tuple(expected))

"""What a daemon says of its host.

Knows the operating system's figures; imports no torch.
"""

from __future__ import annotations

import platform

import psutil

from lingualinked.disk_cache import free_cache_bytes
from lingualinked.host_id import host_id
from lingualinked.processor import processor_name, usable_cores
from lingualinked.protocol.daemon import HostFacts
from lingualinked.quantities import bytes_text, count_text
from lingualinked.versions import installed_versions
from lingualinked.worker.daemon.options import DaemonOptions


def collect_facts(options: DaemonOptions, leasable_bytes: int | None) -> HostFacts:
    """Return the facts of this host as they are now."""
    memory = psutil.virtual_memory()
    return HostFacts(
        name=options.name,
        versions=installed_versions(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(),
        num_cores=usable_cores(),
        threads=options.threads,
        accelerator=options.accelerator,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        leasable_bytes=leasable_bytes,
        free_disk_bytes=free_cache_bytes() or 0,
        host_id=host_id(),
        allows_relays=options.allows_relays,
        advertise=options.advertise,
    )


def describe_hardware(accelerator: str) -> str:
    """Return what the host has, in a line for people."""
    memory = bytes_text(psutil.virtual_memory().total)
    return f"{processor_name()}, {count_text(usable_cores(), 'core')}, {memory}, {accelerator}"

"""``lingualinked doctor``: shows what this machine offers.

Inspects, and measures for a second; starts and changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import platform

import psutil

from lingualinked.console import new_console
from lingualinked.processor import usable_cores
from lingualinked.quantities import bytes_text, count_text
from lingualinked.tables import Rows
from lingualinked.worker.measuring.power import UnknownPowerError, find_counter

_LIBRARIES = ("torch", "transformers", "pyzmq", "safetensors", "msgspec", "scipy", "psutil")


def run_doctor() -> None:
    """Print cores, memory, accelerators, the speed of matrix products, and versions."""
    import torch
    import zmq

    memory = psutil.virtual_memory()
    facts = [
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("Python", platform.python_version()),
        ("cores that this process may use", str(usable_cores())),
        ("CPU capability of torch", torch.backends.cpu.get_cpu_capability()),
        ("memory", f"{bytes_text(memory.available)} available of {bytes_text(memory.total)}"),
        ("accelerators", ", ".join(_accelerators()) or "none: stages run on the CPU"),
        ("energy counters", _energy_counters()),
        ("encryption (CURVE)", "yes" if zmq.has("curve") else "no: workers can't authenticate; install a pyzmq wheel"),
        ("local sockets (ipc)", "yes" if zmq.has("ipc") else "no: tcp on loopback is used"),
    ]
    versions = [("lingualinked", importlib.metadata.version("lingualinked"))]
    versions += [(name, importlib.metadata.version(name)) for name in _LIBRARIES]
    console = new_console()
    console.print(Rows("This machine", ("what", "found"), facts))
    console.print(_products())
    console.print(Rows("Versions", ("library", "version"), versions))


def _products() -> Rows:
    """Measure what a decode step spends its time on: products of few rows, against what memory gives."""
    from lingualinked.model.exact.exact_norm import describe_norms  # imports torch
    from lingualinked.model.exact.linear_speed import DTYPES, measure_linears, measure_memory

    memory_bytes_per_s = measure_memory()
    rows = [
        (
            f"{str(each.dtype).removeprefix('torch.')}, {count_text(each.num_rows, 'row')}",
            each.kernel,
            f"{each.bytes_per_s / 1e9:.1f}",
            f"{each.bytes_per_s / memory_bytes_per_s:.0%}",
        )
        for each in measure_linears()
    ]
    notes = [
        f"One thread reads memory at {memory_bytes_per_s / 1e9:.1f} GB/s. Every kernel has the bits of torch's own.",
        f"A Llama's norms of one row: {describe_norms(DTYPES)}.",
    ]
    return Rows("Products with a large weight, one thread", ("dtype", "kernel", "GB/s", "of memory"), rows, notes=notes)


def _energy_counters() -> str:
    """Return what measures the power of processors here, or why nothing does."""
    counter = find_counter("cpu")
    return f"none: {counter}" if isinstance(counter, UnknownPowerError) else counter.source


def _accelerators() -> list[str]:
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(f"cuda:{index} ({properties.name}, {bytes_text(properties.total_memory)})")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found

"""What the bits of a worker's results depend on besides its weights and inputs: versions, processor, accelerator, threads.

Plain data, and how it differs between workers; knows no torch. `model/process/environment_probe.py` finds it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from lingualinked.device import CALLER, Device
from lingualinked.versions import Versions


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What a process computes with.

    Parameters
    ----------
    host : str
        Name of its host.
    host_id : str
        Equal for processes that share memory and network interfaces.
    machine : str
        Equal for processes on one machine until that starts anew, whatever containers they are in.
    versions : tuple of str
        Versions of lingualinked, torch, transformers and Python, also as attributes of these names.
    processor : str
        Model of the processor.
    cpu_capability : str
        Instruction set that torch's kernels use on the processor, e.g. ``"AVX512"``.
    accelerator : str
        Name of the GPU that its stages compute on; empty if they compute on the processor.
    threads : int
        Threads that it computes with.
    """

    host: str
    host_id: str
    machine: str
    versions: Versions
    processor: str
    cpu_capability: str
    accelerator: str
    threads: int


Environments = Mapping[str, Environment]
"""What processes compute with, by the name of their device, or of the caller."""


def inexact_because(devices: Iterable[Device], environments: Environments | None = None) -> str:
    """Say why stages on these devices can't give the bits of the unsharded model; empty if nothing is known against it.

    Before workers have started no environment is known, and what devices state counts.
    """
    devices = list(devices)
    names = [device.name for device in devices]
    known = {name: each for name, each in (environments or {}).items() if name in (CALLER, *names)}
    kinds = sorted({device.accelerator.split(":")[0] for device in devices})
    if len(kinds) > 1:
        return f"mixed accelerators ({', '.join(kinds)}) round differently"
    because = describe_difference(known)
    threads = sorted({device.threads for device in devices if device.threads is not None and device.name not in known})
    if not because and kinds == ["cpu"] and len(threads) > 1:
        return f"mixed thread counts ({', '.join(map(str, threads))}) sum in different orders"
    return because


def describe_difference(environments: Environments) -> str:
    """Say why workers that compute with these can't give the bits of one, or why the caller's libraries may change them.

    The caller computes no layer, but its versions of torch and transformers prepare what stages compute and turn logits
    into tokens. Its processor may differ, and its build of torch, which may be one for other accelerators.
    """
    stages = {name: each for name, each in environments.items() if name != CALLER}
    caller = environments.get(CALLER)
    torch = _grouped({name: each.versions.torch for name, each in stages.items()})
    if len(torch) < 2 and caller is not None:
        torch = _grouped({name: each.versions.torch.partition("+")[0] for name, each in environments.items()})
    transformers = _grouped({name: each.versions.transformers for name, each in environments.items()})
    for library, groups in (("torch", torch), ("transformers", transformers)):
        if len(groups) > 1:
            return f"versions of {library} differ ({_described(groups)}), and their results may"
    processors = _grouped({name: each.accelerator or "cpu" for name, each in stages.items()})
    if len(processors) > 1:
        return f"mixed accelerators ({_described(processors)}) round differently"
    if list(processors) == ["cpu"]:
        capabilities = _grouped({name: each.cpu_capability for name, each in stages.items()})
        if len(capabilities) > 1:
            return f"mixed instruction sets ({_described(capabilities)}) sum in different orders"
        threads = sorted({each.threads for each in stages.values()})
        if len(threads) > 1:
            return f"mixed thread counts ({', '.join(map(str, threads))}) sum in different orders"
    return ""


def rounding_key(device: Device, environment: Environment | None) -> tuple[object, ...]:
    """Return what devices have in common that round alike, if known."""
    kind = device.accelerator.split(":")[0]
    if environment is None:
        return kind, device.threads if kind == "cpu" else None
    versions = environment.versions.torch, environment.versions.transformers
    if kind == "cpu":
        return kind, environment.threads, *versions, environment.cpu_capability, environment.processor
    return kind, None, *versions, environment.accelerator


def _grouped(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the devices that have each value."""
    groups: dict[str, list[str]] = {}
    for device, value in values.items():
        groups.setdefault(value, []).append(device)
    return groups


def _described(groups: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{value} on {' and '.join(map(repr, names))}" for value, names in sorted(groups.items()))

"""Where a worker runs: the plain description of one device.

Knows no processes and no tensors; a running worker is told what to do by the cluster, never by changing a device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from fractions import Fraction

from lingualinked.errors import ArgumentError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B|B)?\s*", re.IGNORECASE | re.ASCII)
_ACCELERATOR = re.compile(r"cpu|mps|cuda:\d+")


def parse_bytes(amount: int | str, field: str = "memory") -> int:
    """Read an amount of memory.

    Parameters
    ----------
    amount : int or str
        Bytes, or a number with a unit: ``"512MiB"``, ``"2GiB"``, ``"1.5 GB"``.
    field : str
        Name to use in the error.

    Returns
    -------
    int
        The amount, in bytes.

    Raises
    ------
    ArgumentError
        If the text does not parse or the amount is not positive.
    """
    if isinstance(amount, str):
        match = _AMOUNT.fullmatch(amount)
        if match is None:
            raise ArgumentError(
                f"{field}={amount!r} is no amount of memory: write bytes, or a number with a unit (2GiB)"
            )
        number_of_bytes = int(Fraction(match[1]) * _UNITS[(match[2] or "").upper()])
    elif isinstance(amount, int) and not isinstance(amount, bool):
        number_of_bytes = amount
    else:
        raise ArgumentError(f"{field}={amount!r} is no amount of memory: write bytes, or a number with a unit (2GiB)")
    if number_of_bytes <= 0:
        raise ArgumentError(f"{field}={amount!r} must be positive")
    return number_of_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A place where one worker process runs.

    Parameters
    ----------
    name : str
        Unique within a cluster; appears in plans, errors and logs.
    accelerator : str
        ``"cpu"``, ``"cuda:N"`` or ``"mps"``: where the worker's stages hold their weights and compute.
    threads : int or None
        Threads that the worker computes with; ``None``: its share of the machine's cores.
    cpus : tuple of int or None
        Cores that the worker is pinned to; ``None``: any. Where the system has no affinity, giving it is an error.
    memory : int, str or None
        Limit on what the worker holds for its stages (weights, KV cache, working memory) beyond an idle worker, in
        bytes or with a unit (``"2GiB"``); ``None``: no limit. It is checked before weights are read and, on
        Linux, enforced by the kernel (``RLIMIT_DATA``).

    Raises
    ------
    ArgumentError
        For a value that can't be used; the message names the field.
    """

    name: str
    accelerator: str = "cpu"
    threads: int | None = None
    cpus: tuple[int, ...] | None = None
    memory: int | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name != self.name.strip():
            raise ArgumentError(f"name={self.name!r} must be a non-empty text without surrounding blanks")
        if self.name == CALLER:
            raise ArgumentError(f"name={self.name!r} is the name of the calling process: choose another")
        if not isinstance(self.accelerator, str) or _ACCELERATOR.fullmatch(self.accelerator) is None:
            raise ArgumentError(f"accelerator={self.accelerator!r} of device {self.name!r} must be cpu, cuda:N or mps")
        if self.threads is not None and (
            not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 1
        ):
            raise ArgumentError(f"threads={self.threads!r} of device {self.name!r} must be a positive integer")
        if self.cpus is not None:
            cpus = tuple(self.cpus) if isinstance(self.cpus, Iterable) else ()
            are_cores = all(isinstance(cpu, int) and not isinstance(cpu, bool) and cpu >= 0 for cpu in cpus)
            if not cpus or not are_cores or len(set(cpus)) < len(cpus):
                raise ArgumentError(f"cpus={self.cpus!r} of device {self.name!r} must be core numbers, each once")
            object.__setattr__(self, "cpus", cpus)
        if self.memory is not None:
            parse_bytes(self.memory, f"memory of device {self.name!r}")

    @property
    def memory_bytes(self) -> int | None:
        """The memory limit in bytes, or ``None``."""
        return None if self.memory is None else parse_bytes(self.memory)


CALLER = "caller"
"""Name of the calling process among the parties of a cluster."""

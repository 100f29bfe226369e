"""Plain descriptions of the devices that workers run on, and of the links between them.

Knows no processes and no tensors; a device is immutable, and the cluster tells a running worker what changes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction

from lingualinked.checks import as_float, is_integer
from lingualinked.errors import ArgumentError

MOST_BYTES = 2**64 - 1
"""The largest memory that a processor addresses."""

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B|B)?\s*", re.IGNORECASE | re.ASCII)
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(bit|b|B)(?:/s|ps)\s*", re.ASCII)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|ms|us|µs)\s*", re.ASCII)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_ACCELERATOR = re.compile(r"cpu|mps|cuda:\d+")


def parse_bytes(amount: int | str, field: str = "memory") -> int:
    """Parse a memory size in bytes or with a unit (``"512MiB"``, ``"1.5 GB"``); an error names ``field``."""
    match = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if match is not None:
        number_of_bytes = int(Fraction(match[1]) * _UNITS[(match[2] or "").upper()])
    elif isinstance(amount, int) and not isinstance(amount, bool):
        number_of_bytes = amount
    else:
        raise ArgumentError(
            f"{field}={amount!r} is not a valid memory size: write bytes, or a number with a unit (2GiB)"
        )
    if number_of_bytes <= 0:
        raise ArgumentError(f"{field}={amount!r} must be positive")
    return number_of_bytes


def parse_rate(rate: float | str, field: str = "bandwidth") -> float:
    """Parse bytes per second, or a number with a unit (``"100Mbit/s"``, ``"12.5MB/s"``; decimal prefixes)."""
    match = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if match is not None:
        bytes_per_s = float(match[1]) * 1000.0 ** " KMGT".index(match[2] or " ") / (1 if match[3] == "B" else 8)
    else:
        refusal = f"{field}={rate!r} is not a valid bandwidth: write bytes per second, or 100Mbit/s, or 12.5MB/s"
        bytes_per_s = as_float(rate, refusal)
    if not 0 < bytes_per_s < math.inf:
        raise ArgumentError(f"{field}={rate!r} must be positive and finite")
    return bytes_per_s


def parse_seconds(duration: float | str, field: str = "latency") -> float:
    """Parse a duration in seconds or with a unit (``"3ms"``, ``"250us"``), which may be zero."""
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is not None:
        seconds = float(match[1]) * _SECONDS[match[2]]
    else:
        refusal = f"{field}={duration!r} is not a valid duration: write seconds, or 3ms, or 250us"
        seconds = as_float(duration, refusal)
    if not 0 <= seconds < math.inf:
        raise ArgumentError(f"{field}={duration!r} must be finite and not negative")
    return seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that runs one worker process.

    Parameters
    ----------
    name : str
        Unique within a cluster; appears in plans, errors and logs.
    accelerator : str
        ``"cpu"``, ``"cuda:N"`` or ``"mps"``: where the worker's stages hold their weights and compute.
    threads : int or None
        Threads that the worker computes with; ``None``: its share of the machine's cores.
    cpus : tuple of int or None
        Cores that the worker is pinned to; ``None``: any. It is an error on systems that can't pin processes to cores.
    memory : int, str or None
        Limit on what the worker holds for its stages (weights, KV cache, working memory) beyond an idle worker, in
        bytes or with a unit (``"2GiB"``); ``None``: no limit. It is checked before weights are read and enforced: on
        Linux by the kernel (``RLIMIT_DATA``), on a CUDA GPU by torch's allocator, where what the driver needs for each
        process (about half a GiB) comes on top.
    slowdown : float
        Makes the worker emulate a device that computes this many times slower: it rests after every step, in proportion
        to the CPU time that the step took. At least 1; only local CPU workers can emulate.
    bandwidth : float, str or None
        Of the device's network connection, in bytes per second or with a unit (``"100Mbit/s"``); messages to and from a
        local worker are delayed accordingly. ``None``: not limited.
    latency : float, str or None
        Of the device's network connection, one way, in seconds or with a unit (``"3ms"``); ``None``: none is emulated.
    watts : float or None
        Power while it computes, for ``objective="energy"``; ``None``: measured with the model if the machine has
        counters, by RAPL for processors and by NVML for NVIDIA's GPUs (`DeviceProfile.watts`).
    trusted : bool
        Whether it may see token ids and logits. As soon as one device is marked, only marked devices may.

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
    slowdown: float = 1.0
    bandwidth: float | str | None = None
    latency: float | str | None = None
    watts: float | None = None
    trusted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name != self.name.strip():
            raise ArgumentError(f"name={self.name!r} must be non-empty text without leading or trailing blanks")
        if not self.name.isprintable():
            raise ArgumentError(f"name={self.name!r} must be printable: it appears in plans, errors and logs")
        if self.name == CALLER:
            raise ArgumentError(f"name={self.name!r} is reserved for the calling process: choose another")
        if not isinstance(self.accelerator, str) or _ACCELERATOR.fullmatch(self.accelerator) is None:
            raise ArgumentError(f"accelerator={self.accelerator!r} of device {self.name!r} must be cpu, cuda:N or mps")
        if self.threads is not None and not is_integer(self.threads, at_least=1):
            raise ArgumentError(f"threads={self.threads!r} of device {self.name!r} must be a positive integer")
        if self.cpus is not None:
            cpus = tuple(self.cpus) if isinstance(self.cpus, Iterable) else ()
            are_cores = all(is_integer(cpu, at_least=0) for cpu in cpus)
            if not cpus or not are_cores or len(set(cpus)) < len(cpus):
                raise ArgumentError(
                    f"cpus={self.cpus!r} of device {self.name!r} must be a list of distinct core numbers"
                )
            object.__setattr__(self, "cpus", cpus)
        if self.memory is not None and parse_bytes(self.memory, f"memory of device {self.name!r}") > MOST_BYTES:
            raise ArgumentError(f"memory={self.memory!r} of device {self.name!r} must be less than 16 EiB")
        self._check_slowdown()
        if self.bandwidth is not None:
            parse_rate(self.bandwidth, f"bandwidth of device {self.name!r}")
        if self.latency is not None:
            parse_seconds(self.latency, f"latency of device {self.name!r}")
        if self.watts is not None:
            field = f"watts={self.watts!r} of device {self.name!r}"
            if not 0 < as_float(self.watts, f"{field} must be a number") < math.inf:
                raise ArgumentError(f"{field} must be positive and finite")
        if not isinstance(self.trusted, bool):
            raise ArgumentError(f"trusted={self.trusted!r} of device {self.name!r} must be True or False")

    def _check_slowdown(self) -> None:
        field = f"slowdown={self.slowdown!r} of device {self.name!r}"
        if not 1 <= as_float(self.slowdown, f"{field} must be a number") < math.inf:
            raise ArgumentError(f"{field} must be at least 1: a worker can't be made faster than its machine")
        if self.slowdown != 1 and self.accelerator != "cpu":
            raise ArgumentError(f"{field}: only a CPU worker can emulate a slower device")

    @property
    def memory_bytes(self) -> int | None:
        """The memory limit in bytes, or ``None``."""
        return None if self.memory is None else parse_bytes(self.memory)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bandwidth of its network connection, in bytes per second; infinite if not given."""
        return math.inf if self.bandwidth is None else parse_rate(self.bandwidth)

    @property
    def latency_s(self) -> float:
        """Latency of its network connection, in seconds; 0 if not given."""
        return 0.0 if self.latency is None else parse_seconds(self.latency)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Bandwidth and latency of messages from one device to another.

    Parameters
    ----------
    bandwidth : float, str or None
        Bytes per second, or with a unit (``"1Gbit/s"``); ``None``: not limited.
    latency : float or str
        One way, in seconds or with a unit (``"2ms"``).

    Raises
    ------
    ArgumentError
        For a value that can't be used; the message names the field.
    """

    bandwidth: float | str | None = None
    latency: float | str = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth is not None:
            parse_rate(self.bandwidth, "bandwidth of a link")
        parse_seconds(self.latency, "latency of a link")

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bandwidth in bytes per second; infinite if not given."""
        return math.inf if self.bandwidth is None else parse_rate(self.bandwidth)

    @property
    def latency_s(self) -> float:
        """Latency in seconds."""
        return parse_seconds(self.latency)


Links = Mapping[tuple[str, str], Link]
"""Links by the names of their source and target; either may be the caller."""


def link_between(source: Device | None, target: Device | None, links: Links) -> Link:
    """Return the link from one device to another, or from or to the caller (``None``).

    A link that `links` does not name has the smaller bandwidth of its two ends and the sum of their latencies.
    """
    given = links.get((CALLER if source is None else source.name, CALLER if target is None else target.name))
    if given is not None:
        return given
    ends = [end for end in (source, target) if end is not None]
    bandwidth = min((end.bandwidth_bytes_per_s for end in ends), default=math.inf)
    return Link(bandwidth=None if bandwidth == math.inf else bandwidth, latency=sum(end.latency_s for end in ends))


def check_links(links: object, names: Iterable[str], end: str | None = None) -> dict[tuple[str, str], Link]:
    """Check that every link leads from one known party to another, with one end at a given one; return a copy."""
    known = {CALLER, *names}
    if not isinstance(links, Mapping):
        raise ArgumentError(f"links is a {type(links).__name__}: give a dict from (source, target) to Link")
    for ends, link in links.items():
        if not isinstance(ends, tuple) or len(ends) != 2 or not isinstance(link, Link):
            raise ArgumentError(f"links has {ends!r}: {link!r}: give (source, target) names and a lingualinked.Link")
        for name in ends:
            if name not in known:
                raise ArgumentError(f"links has {ends!r}, but there is no device {name!r}: choose from {sorted(known)}")
        if ends[0] == ends[1]:
            raise ArgumentError(f"links has {ends!r}: a link connects two different devices")
        if end not in (None, *ends):
            raise ArgumentError(f"links has {ends!r}, which is not a link of device {end!r}: leave it out")
    return dict(links)


CALLER = "caller"
"""Name of the calling process among the parties of a cluster."""

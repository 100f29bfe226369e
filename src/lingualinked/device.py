"""Plain descriptions of the devices that workers run on, and of the links between them.

Knows no processes and no tensors; a device is immutable, and the cluster tells a running worker what changes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from lingualinked.address import parse_address, parse_advertised
from lingualinked.checks import as_float, is_integer
from lingualinked.errors import ArgumentError
from lingualinked.public_key import check_key_name, raw_key
from lingualinked.units import MOST_BYTES, parse_bytes, parse_rate, parse_seconds

_ACCELERATOR = re.compile(r"cpu|mps|cuda:\d+")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that runs one worker process: this machine, or another one where ``lingualinked worker`` runs.

    Parameters
    ----------
    name : str
        Unique within a cluster; appears in plans, errors and logs.
    accelerator : str
        ``"cpu"``, ``"cuda:N"`` or ``"mps"``: where the worker's stages hold their weights and compute. A daemon decides that
        where it is started; another accelerator than its own is an error.
    threads : int or None
        Threads that the worker computes with; ``None``: its share of the machine's cores, or what a daemon allows.
    cpus : tuple of int or None
        Cores that a local worker is pinned to; ``None``: any. It is an error on systems that can't pin processes to cores.
    memory : int, str or None
        Limit on what the worker holds for its stages (weights, KV cache, working memory) beyond an idle worker, in
        bytes or with a unit (``"2GiB"``); ``None``: no limit, or what a daemon has left. It is checked before weights are read
        and enforced: on Linux by the kernel (``RLIMIT_DATA``), on a CUDA GPU by torch's allocator, where what the driver
        needs for each process (about half a GiB) comes on top. On a processor, so do up to 256 MiB once for each: what probes of its
        rounding keep in a worker until their results are on disk.
    slowdown : float
        Makes the worker emulate a device that computes this many times slower: it rests after every step, in proportion
        to the CPU time that the step took. At least 1; only CPU workers can emulate.
    bandwidth : float, str or None
        Of the device's network connection, in bytes per second or with a unit (``"100Mbit/s"``); messages to and from a
        local worker are delayed accordingly. ``None``: not limited. Connections of a device with an `address` are as fast
        as they are: what is stated there, and of its links, serves plans that are made without a measurement.
    latency : float, str or None
        Of the device's network connection, one way, in seconds or with a unit (``"3ms"``); ``None``: none is emulated. Of
        a device with an `address` it is a statement too.
    watts : float or None
        Power while it computes, for ``objective="energy"``; ``None``: measured with the model if the machine has
        counters, by RAPL for processors and by NVML for NVIDIA's GPUs (`DeviceProfile.watts`).
    trusted : bool
        Whether it may see token ids and logits. As soon as one device is marked, only marked devices may.
    address : str or None
        Where the device's daemon (``lingualinked worker``) listens: ``"tcp://HOST:PORT"`` with a host name, an IPv4 address,
        or an IPv6 address in brackets. ``None``: the worker is a process of this machine.
    server_key : str or None
        Public key of that daemon, 40 characters, as it prints it; ``None``: what ``known_hosts`` says for this address.
    key : str or None
        Name of the key by which this process is authorised there (``lingualinked keys new NAME``); ``None``: ``"default"``.
    advertise : str or None
        Where other devices reach this one's worker: ``"HOST"``, or behind a port map ``"HOST:PORT"`` or
        ``"HOST:FIRST-LAST"``. ``None``: what the daemon says, else the host of `address`.

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
    address: str | None = None
    server_key: str | None = None
    key: str | None = None
    advertise: str | None = None

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
        if self.address is None:
            self._refuse_fields(("server_key", "key", "advertise"), "only a device with an address has one")
        else:
            self._check_remote(self.address)

    def _check_remote(self, address: str) -> None:
        of_device = f"of device {self.name!r}"
        object.__setattr__(self, "address", str(parse_address(address, f"address {of_device}")))
        self._refuse_fields(
            ("cpus",), "only a local worker can be pinned to cores; a daemon's are chosen where it is started"
        )
        if self.server_key is not None:
            raw_key(self.server_key, f"server_key {of_device}")
        if self.key is not None:
            check_key_name(self.key, f"key {of_device}")
        if self.advertise is not None:
            parse_advertised(self.advertise, f"advertise {of_device}")

    def _refuse_fields(self, fields: Iterable[str], why: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value is not None:
                raise ArgumentError(f"{field}={value!r} of device {self.name!r} has no effect: {why}; leave it out")

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
    relay : str or None
        Name of a third device through whose daemon these messages travel, for two ends that can't reach each other; that
        daemon must allow it (``lingualinked worker --relay``). Bandwidth and latency are then those of the whole way.
        ``None``: they travel directly.

    Raises
    ------
    ArgumentError
        For a value that can't be used; the message names the field.
    """

    bandwidth: float | str | None = None
    latency: float | str = 0.0
    relay: str | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is not None:
            parse_rate(self.bandwidth, "bandwidth of a link")
        parse_seconds(self.latency, "latency of a link")
        if self.relay is not None and not isinstance(self.relay, str):
            raise ArgumentError(f"relay={self.relay!r} of a link must be the name of a device")

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
    """Check that every link leads from one known party to another, with one end at a given one; return a copy.

    Its relay, if any, must be a third party, and a device.
    """
    devices = set(names)
    known = {CALLER, *devices}
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
        if link.relay is not None and (link.relay not in devices or link.relay in ends):
            others = sorted(devices.difference(ends))
            raise ArgumentError(
                f"relay={link.relay!r} of the link {ends!r} must be a third device: choose from {others}"
            )
    return dict(links)


CALLER = "caller"
"""Name of the calling process among the parties of a cluster."""

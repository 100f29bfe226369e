"""Daemons announce themselves in the local network, and are found there (multicast DNS, by zeroconf).

Knows names, addresses and fingerprints. Anybody can announce anything: what is found is checked for its form, and trusted in nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lingualinked.address import Address, parse_address
from lingualinked.device import Device
from lingualinked.errors import ArgumentError
from lingualinked.public_key import fingerprint
from lingualinked.transport.hosts.host_addresses import own_addresses

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

logger = logging.getLogger("lingualinked.daemon")

SERVICE_TYPE = "_lingualinked._tcp.local."

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_MOST_FOUND = 256  # daemons, so that a flood of them is bounded
_MOST_BYTES = 200  # of one text; a record has 255
_LABEL_BYTES = 63  # of a name in DNS
_ANSWER_MS = 1000  # that one daemon may take to say what it is


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a daemon says of itself in the local network."""

    name: str
    address: str
    hardware: str
    fingerprint: str  # of its public key


class Announcer:
    """Announces a daemon until it is stopped.

    Parameters
    ----------
    name : str
        Of the device; another daemon of that name gets a number added by multicast DNS alone.
    address : Address
        Where others reach the daemon.
    hardware : str
        What the device is, for people.
    public_key : str
        Of the daemon. Its fingerprint is announced.
    interface : str or None
        Address of the one interface on which it is announced; ``None``: all of them.

    Raises
    ------
    ArgumentError
        If zeroconf is not installed, or the network can't be used.
    """

    def __init__(
        self, *, name: str, address: Address, hardware: str, public_key: str, interface: str | None = None
    ) -> None:
        self._announced = Announcement(
            name=name, address=str(address), hardware=hardware, fingerprint=fingerprint(public_key)
        )
        self._interface = interface
        self._responder: Zeroconf | None = None
        self._registering = threading.Thread()

    def start(self) -> None:
        """Begin to answer those who look for daemons; it takes some seconds until that is agreed in the network."""
        with _named_errors("announce"):
            self._responder = responder = _open(self._interface)
        service = _service_of(self._announced, self._interface)
        self._registering = threading.Thread(
            target=_register, args=(responder, service), name="lingualinked-announcing", daemon=True
        )
        self._registering.start()

    def stop(self) -> None:
        """Say that the daemon is gone, and answer no more."""
        responder, self._responder = self._responder, None
        if responder is not None:
            responder.close()  # which takes back what was registered, and ends a registration that is under way
            self._registering.join()


def _register(responder: Zeroconf, service: ServiceInfo) -> None:
    try:
        with _named_errors("announce"):
            responder.register_service(service, allow_name_change=True)
    except (ArgumentError, RuntimeError) as error:  # it may be closed meanwhile
        if not responder.done:
            logger.error("%s", error)


def find_announced(seconds: float, interface: str | None = None) -> tuple[Announcement, ...]:
    """Look for daemons for so many seconds; return those whose announcements can be read, by name and address."""
    names: dict[str, None] = {}
    found: list[Announcement] = []
    with _named_errors("look for"):
        from zeroconf import DNSQuestionType, ServiceBrowser, ServiceStateChange

        # zeroconf calls it with these names
        def note(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:  # noqa: ARG001
            if state_change is ServiceStateChange.Removed:
                names.pop(name, None)
            elif len(names) < _MOST_FOUND:
                names[name] = None

        querier = _open(interface)
        try:
            # Answers to all: those to the asker alone reach one of the sockets that share the port, on this machine.
            question = DNSQuestionType.QM
            browser = ServiceBrowser(querier, SERVICE_TYPE, handlers=[note], question_type=question)
            time.sleep(seconds)
            browser.cancel()
            for name in list(names):
                info = querier.get_service_info(SERVICE_TYPE, name, _ANSWER_MS, question)
                announced = None if info is None else read_announcement(info.decoded_properties)
                if announced is not None:
                    found.append(announced)
        finally:
            querier.close()
    return tuple(sorted(set(found), key=lambda each: (each.name, each.address)))


def read_announcement(properties: dict[str, Any]) -> Announcement | None:
    """Read the texts of an announcement, which anybody may have sent; ``None`` if one can't be used."""
    texts = {name: properties.get(name) for name in ("name", "address", "hardware", "fingerprint")}
    if not all(isinstance(text, str) and text.isprintable() for text in texts.values()):
        return None
    announced = Announcement(**texts)  # type: ignore[arg-type]  # they are texts
    with contextlib.suppress(ArgumentError):
        address = str(parse_address(announced.address, "address"))
        Device(name=announced.name, address=address)
        if _FINGERPRINT.fullmatch(announced.fingerprint):
            return dataclasses.replace(announced, address=address)
    return None


def _service_of(announced: Announcement, interface: str | None = None) -> ServiceInfo:
    from zeroconf import ServiceInfo

    address = parse_address(announced.address, "address")
    label = re.sub(r"[.\s]+", " ", announced.name).encode()[:_LABEL_BYTES].decode(errors="ignore").strip() or "device"
    try:
        numeric = [ipaddress.ip_address(address.host)]
    except ValueError:  # a name; without an address, a service would not be found
        own = set(own_addresses()) if interface is None else {interface}
        numeric = [ipaddress.ip_address(text) for text in sorted(own)]
    return ServiceInfo(
        SERVICE_TYPE,
        f"{label}.{SERVICE_TYPE}",
        port=address.port,
        addresses=[each.packed for each in numeric],
        properties={name: _short(text) for name, text in dataclasses.asdict(announced).items()},
    )


def _short(text: str) -> str:
    return text.encode()[:_MOST_BYTES].decode(errors="ignore")


def _open(interface: str | None) -> Zeroconf:
    from zeroconf import InterfaceChoice, Zeroconf

    own = sorted(set(own_addresses()))
    # zeroconf would leave a socket open. All of 127/8 is the loopback interface.
    if interface is not None and interface not in own and not interface.startswith("127."):
        raise ArgumentError(f"no interface of this machine has the address {interface!r}: choose from {own}")
    return Zeroconf(interfaces=InterfaceChoice.All if interface is None else [interface])


@contextlib.contextmanager
def _named_errors(purpose: str) -> Iterator[None]:
    """Say what can't be done and why, if zeroconf is missing or the network can't be used."""
    try:
        import zeroconf
    except ImportError as error:
        raise ArgumentError(
            f"to {purpose} daemons in the local network, zeroconf is needed: pip install 'lingualinked[discovery]'"
        ) from error
    try:
        yield
    except (OSError, zeroconf.Error) as error:
        raise ArgumentError(
            f"can't {purpose} daemons in the local network: {str(error) or type(error).__name__}; state addresses in a cluster file"
        ) from error

"""The options of ``lingualinked worker`` and of ``python -m lingualinked.worker``, checked, and the daemon that they start.

Knows texts and where a daemon's log goes; not what the daemon does.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lingualinked.address import Address, parse_address, parse_advertised, parse_ports
from lingualinked.device import Device
from lingualinked.errors import ArgumentError, LingualinkedError
from lingualinked.processes.accelerators import check_accelerator
from lingualinked.processor import usable_cores
from lingualinked.public_key import fingerprint
from lingualinked.transport.hosts.host_addresses import local_host_towards, look_up, own_addresses
from lingualinked.units import parse_bytes
from lingualinked.worker.daemon.options import DaemonOptions
from lingualinked.worker.process.inheritance import allow_open_files

if TYPE_CHECKING:
    from lingualinked.transport.hosts.announcing import Announcer

logger = logging.getLogger("lingualinked.daemon")

_NOWHERE = ("192.0.2.1", 9)  # of documentation: connecting a datagram socket sends nothing
_DEFAULT_CACHE = "20GiB"


def serve(
    bind: Annotated[
        str,
        typer.Option(
            help="Address to listen at, tcp://HOST:PORT; 0.0.0.0 for all of this host, port 0 for any free one."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of this device in logs; by default the host's.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that all workers together may take (8GiB); by default no limit.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a worker at most; by default the number of cores.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="Where workers compute: cpu, cuda:N or mps.")] = "cpu",
    models: Annotated[str | None, typer.Option(help="Folder of checkpoints that workers may read.")] = None,
    cache_bytes: Annotated[
        str, typer.Option(help="Disk space for weights that were sent here; 0 for none.")
    ] = _DEFAULT_CACHE,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare all weights that workers load here with the caller's, byte by byte."),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run the code that lies beside checkpoints in --models and in the hub's cache, where a caller asks for it.",
        ),
    ] = False,
    ports: Annotated[
        str | None, typer.Option(help="Ports at which workers may listen (5601-5699); by default any free ones.")
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(help="Where others reach the workers, HOST or HOST:FIRST-LAST, if not where they listen."),
    ] = None,
    relay: Annotated[
        bool, typer.Option("--relay", help="Let other devices of a caller send through this one.")
    ] = False,
    announce: Annotated[
        bool, typer.Option("--announce", help="Let `lingualinked discover` find this device in the local network.")
    ] = False,
    authorize: Annotated[
        list[str] | None, typer.Option(help="Public key of a client to let in for this run; may be repeated.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Serve one caller, and end when it is gone.")] = False,
    wait: Annotated[
        float | None, typer.Option(min=0, help="With --once: end with status 3 if nobody comes within so many seconds.")
    ] = None,
    lifeline: Annotated[
        bool, typer.Option("--lifeline", help="End when standard input is closed, as it is when the parent has ended.")
    ] = False,
) -> None:
    """Run this device's daemon: it starts workers here for authorised callers on other hosts.

    It prints one line, tcp://HOST:PORT#PUBLIC_KEY, once it listens; its log goes to standard error.
    """
    if wait is not None and not once:
        raise ArgumentError(f"--wait {wait:g} has no effect without --once: add it, or leave this out")
    name = name or platform.node() or "device"
    check_accelerator(Device(name=name, accelerator=accelerator))
    if advertise is not None:
        parse_advertised(advertise, "--advertise")
    if models is not None and not Path(models).is_dir():
        raise ArgumentError(
            f"--models={models!r} is not a folder on this host: give the one that the checkpoints lie in"
        )
    from lingualinked.model.weight_files.weight_cache import default_cache_folder  # other commands need none of it

    max_cache_bytes = 0 if cache_bytes == "0" else parse_bytes(cache_bytes, "--cache-bytes")
    options = DaemonOptions(
        bind=_numeric(parse_address(bind, "--bind", wildcard=True)),
        name=name,
        memory_bytes=None if memory is None else parse_bytes(memory, "--memory"),
        threads=threads or usable_cores(),
        accelerator=accelerator,
        models=None if models is None else str(Path(models).absolute()),
        cache=str(default_cache_folder()) if max_cache_bytes else "",
        cache_bytes=max_cache_bytes,
        verifies=verify,
        allows_code=trust_remote_code,
        ports=None if ports is None else parse_ports(ports, "--ports"),
        advertise=advertise,
        allows_relays=relay,
        announces=announce,
        serves_once=once,
        wait_s=wait,
        clients=tuple(authorize or ()),
        has_lifeline=lifeline,
    )
    raise typer.Exit(run_daemon(options))


def main() -> None:
    """Run the daemon that ``python -m lingualinked.worker`` asks for."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    try:
        app(prog_name="python -m lingualinked.worker")
    except LingualinkedError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(1)


def run_daemon(options: DaemonOptions) -> int:
    """Run a daemon until it ends; return its exit status."""
    from lingualinked.transport.keys.key_files import find_daemon_keys  # these import zmq
    from lingualinked.transport.keys.key_lists import clients_path
    from lingualinked.transport.keys.keys import generate_keypair  # these too
    from lingualinked.worker.daemon.clients import Clients
    from lingualinked.worker.daemon.daemon import Daemon  # and this

    _log_to_standard_error()
    allow_open_files()  # a few for each caller
    clients = Clients(options.clients)
    if not clients.names and not options.bind.is_loopback:
        raise ArgumentError(
            f"no client is authorised, so that nobody could use a daemon at {options.bind}: authorise one by `lingualinked keys "
            f"authorize PUBKEY` ({clients_path()}), or by --authorize PUBKEY; its user makes the key by `lingualinked keys new`"
        )
    # A daemon that serves once leaves nothing behind, and many may start from one home folder.
    keys = generate_keypair() if options.serves_once else find_daemon_keys()
    announcers = contextlib.ExitStack()
    daemon = Daemon(options, keys, clients)

    def announce() -> None:
        reached_at = _reached_at(daemon.address, options.advertise)
        if options.announces:
            announcers.callback(_start_announcing(options, reached_at, keys.public).stop)
        number, key = len(clients.names), fingerprint(keys.public)
        logger.info("listens at %s for %d authorised clients, with the key %s", daemon.address, number, key)
        sys.stdout.write(f"{reached_at}#{keys.public}\n")
        sys.stdout.flush()

    with announcers:
        return daemon.run(announce)


def _start_announcing(options: DaemonOptions, address: Address, public_key: str) -> Announcer:
    """Announce the daemon on the interface that it listens at, or on all."""
    from lingualinked.transport.hosts.announcing import Announcer  # imports zmq
    from lingualinked.worker.daemon.host_facts import describe_hardware  # and msgspec

    bound = options.bind
    announcer = Announcer(
        name=options.name,
        address=address,
        hardware=describe_hardware(options.accelerator),
        public_key=public_key,
        interface=None if bound.is_wildcard else bound.host,
    )
    announcer.start()
    return announcer


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    root = logging.getLogger("lingualinked")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False


def _numeric(address: Address) -> Address:
    """Return where to listen, in numbers."""
    if address.host == "*":
        return Address("0.0.0.0", address.port)  # noqa: S104 - asked for
    try:
        return Address(look_up(address.host), address.port)
    except OSError as error:
        raise ArgumentError(
            f"--bind={str(address)!r}: the host name can't be resolved ({error.strerror}): write an IP address of this machine"
        ) from error


def _reached_at(address: Address, advertise: str | None) -> Address:
    """Return where others reach a daemon that listens at an address."""
    if advertise is not None:
        return Address(parse_advertised(advertise, "--advertise").host, address.port)
    if not address.is_wildcard:
        return address
    if ":" in address.host:
        return Address(_own_address(socket.AF_INET6), address.port)
    try:
        return Address(local_host_towards(*_NOWHERE), address.port)
    except OSError:  # no route leads out
        return Address(_own_address(socket.AF_INET), address.port)


def _own_address(family: int) -> str:
    """Return the first address of this host that others may reach, or else its name."""
    usable = [each for each in own_addresses(family) if not Address(each, 1).is_loopback and "%" not in each]
    return next(iter(usable), platform.node() or "localhost")

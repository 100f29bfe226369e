"""``python -m benchmarks network-hops``: a hop over TCP between network namespaces, against ipc, encrypted and not.

Knows mailboxes and bare ZeroMQ sockets. Needs root and iproute2. As a program, it is a process in one of the namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import zmq

from lingualinked.address import parse_address
from lingualinked.cli.repeats import Repeats
from lingualinked.console import new_console
from lingualinked.quantities import bytes_text
from lingualinked.tables import Rows
from lingualinked.transport.hosts.relay import Relay
from lingualinked.transport.keys.keys import KeyPair, generate_keypair
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

_HERE, _THERE = "10.78.0.1", "10.78.0.2"
_NUM_WARM = 4
_MAILBOXES = ("ipc, mailbox", "TCP, mailbox", "TCP, mailbox, relay")
_BARE = ("ipc, plain", "ipc, CURVE", "TCP, plain", "TCP, CURVE")
_Exchange = Callable[[torch.Tensor], None]


def run_network_hops(sizes: tuple[int, ...], repeats: int) -> None:
    """Make two namespaces, and print the time of a hop for each size and way, measured in turn."""
    names = [f"llbench-{os.getpid()}-{end}" for end in ("here", "there")]
    with contextlib.ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
        _run("ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, (_HERE, _THERE), strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                _run("ip", "-n", name, "link", "set", interface, "up")
        arguments = [names[1], str(repeats), *map(str, sizes)]
        _run("ip", "netns", "exec", names[0], sys.executable, "-m", "benchmarks.network_hops", "measure", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _measure(namespace: str, repeats: int, sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)
    rows = []
    with _exchanges(namespace) as exchanges:
        for size in sizes:
            tensor = torch.randint(0, 255, (size,), dtype=torch.uint8)
            times: dict[str, list[float]] = {way: [] for way in exchanges}
            for number in range(_NUM_WARM + 20 * repeats):
                for way, exchange in exchanges.items():
                    began_s = time.perf_counter()
                    exchange(tensor)
                    if number >= _NUM_WARM:
                        times[way].append((time.perf_counter() - began_s) / 2 * 1e6)
            rows.append((bytes_text(size), *(f"{Repeats(values).median:.0f}" for values in times.values())))
    new_console().print(Rows(f"One hop, µs, medians of {20 * repeats}", ("tensor", *exchanges), rows))


@contextlib.contextmanager
def _exchanges(namespace: str) -> Iterator[dict[str, _Exchange]]:
    """Start the process at the other end, in its namespace; yield what sends it a tensor each way, and gets it back."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "benchmarks.network_hops", "echo"]
        peer = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(peer.kill)
        assert peer.stdin is not None
        assert peer.stdout is not None

        def tell(*said: str) -> list[str]:
            assert peer.stdin is not None
            assert peer.stdout is not None
            peer.stdin.write(json.dumps(said) + "\n")
            peer.stdin.flush()
            return json.loads(peer.stdout.readline())  # type: ignore[no-any-return]

        found: dict[str, _Exchange] = {}
        for way in _MAILBOXES:
            mine, theirs = generate_keypair(), generate_keypair()
            box = stack.enter_context(_mailbox(way, "here", mine, _HERE))
            box.authorise("echo", theirs.public, same_host=False)
            back = box.address
            if way.endswith("relay"):
                back = _relayed(stack, back, _HERE)
            (address,) = tell(way, mine.public, back, theirs.public, theirs.secret)
            box.connect("echo", _relayed(stack, address, _HERE) if way.endswith("relay") else address, theirs.public)
            found[way] = _mailbox_exchange(box)
        context = stack.enter_context(zmq.Context())
        for number, way in enumerate(_BARE):
            server, client = generate_keypair(), generate_keypair()
            endpoint = f"ipc://{folder}/{number}" if way.startswith("ipc") else f"tcp://{_THERE}:{5700 + number}"
            tell(way, endpoint, server.public, server.secret)
            socket = stack.enter_context(context.socket(zmq.PAIR))
            socket.linger = 0
            if way.endswith("CURVE"):
                socket.curve_serverkey = server.public.encode()
                socket.curve_publickey, socket.curve_secretkey = client.public.encode(), client.secret.encode()
            socket.connect(endpoint)
            found[way] = _bare_exchange(socket)
        yield found


def _mailbox(way: str, name: str, keys: KeyPair, host: str) -> ZmqMailbox:
    is_local = way.startswith("ipc")
    return ZmqMailbox(name, keys, ipc=is_local, tcp=None if is_local else TcpEndpoint(host=host), shared_memory=False)


def _relayed(stack: contextlib.ExitStack, address: str, host: str) -> str:
    relay = Relay(TcpEndpoint(host=host), parse_address(address, "address"))
    stack.callback(relay.close)
    return relay.address


def _mailbox_exchange(box: ZmqMailbox) -> _Exchange:
    def exchange(tensor: torch.Tensor) -> None:
        box.send("echo", b"x", [tensor])
        answer = box.receive(60)
        assert answer is not None
        assert answer.tensors[0].nbytes == tensor.nbytes

    return exchange


def _bare_exchange(socket: zmq.Socket[bytes]) -> _Exchange:
    def exchange(tensor: torch.Tensor) -> None:
        socket.send(tensor.numpy().tobytes())
        assert len(socket.recv()) == tensor.nbytes

    return exchange


def _echo() -> None:
    """Answer on all ways at once; each is used alone."""
    boxes: list[ZmqMailbox] = []
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if sys.stdin.fileno() in ready:
            way, *said = json.loads(sys.stdin.readline())
            if way in _MAILBOXES:
                key, back, public, secret = said
                box = _mailbox(way, "echo", KeyPair(public, secret), _THERE)
                box.authorise("here", key, same_host=False)
                box.connect("here", back, key)
                boxes.append(box)
                poller.register(box._inbox, zmq.POLLIN)  # noqa: SLF001 - only to wait for several at once
                answer = [box.address]
            else:
                endpoint, public, secret = said
                socket = context.socket(zmq.PAIR)
                if way.endswith("CURVE"):
                    socket.curve_server = True
                    socket.curve_publickey, socket.curve_secretkey = public.encode(), secret.encode()
                socket.bind(endpoint)
                poller.register(socket, zmq.POLLIN)
                answer = []
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        for box in boxes:
            if box._inbox in ready and (delivery := box.receive(0)) is not None:  # noqa: SLF001
                box.send("here", b"x", delivery.tensors)
        for socket in [each for each in ready if isinstance(each, zmq.Socket) and each.type == zmq.PAIR]:
            socket.send(socket.recv())


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        _echo()
    else:
        _measure(sys.argv[2], int(sys.argv[3]), [int(size) for size in sys.argv[4:]])

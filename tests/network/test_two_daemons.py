"""A caller and two daemons on three hosts: the same tokens, and what a listener and a stranger get."""

from __future__ import annotations

import json
import struct

import psutil
import pytest

from network import namespaces
from network.half_open import GREETING, half_open
from network.hosts import Host
from network.lab import CLOSE, OTHER_SPANS, Lab, log
from network.uncut import PROMPT, Uncut
from network.zmtp import frames_of
from waiting import wait_until

pytestmark = pytest.mark.slow


def test_tokens_are_those_of_the_uncut_model_and_a_listener_learns_nothing(lab: Lab, uncut: Uncut) -> None:
    with lab.network.capture() as capture:
        lab.open()
        assert lab.tokens() == uncut.tokens(12)
        lab.caller.run("model.rebalance(ll.Plan.from_spans([tuple(each) for each in spans]))", spans=OTHER_SPANS)
        assert lab.tokens() == uncut.tokens(12)
        lab.caller.run(CLOSE)
    assert capture.num_lost == 0
    assert capture.num_bytes > uncut.span_bytes(0, 8)  # the weights did cross the wire
    for what, pattern in secrets(uncut).items():
        assert not capture.find(pattern), f"{what} is readable on the wire: {capture.find(pattern)[:3]}"


def secrets(uncut: Uncut) -> dict[str, bytes]:
    """Everything that must not be readable on a wire, in each form that it could have there."""
    new = uncut.tokens(12)[len(PROMPT) :]
    found: dict[str, bytes] = {}
    for name, ids in (("the prompt", PROMPT), ("the new tokens", new)):
        for kind in "qih":  # int64, int32, int16
            found[f"{name} as {kind}"] = struct.pack(f"<{4}{kind}", *ids[:4])
        found[f"{name} in msgpack"] = b"".join(_packed(each) for each in ids[:5])
        found[f"{name} as text"] = json.dumps(ids[:4]).strip("[]").encode()
    with (uncut.folder / "model.safetensors").open("rb") as file:
        weights = file.read()
    for place in (len(weights) // 5, len(weights) // 2, len(weights) - 4096):
        found[f"weights at {place}"] = weights[place : place + 32]
    texts = [
        "model.layers",
        "self_attn",
        "q_proj",
        "data_offsets",
        "safetensors",
        "bfloat16",
        "BF16",
        "LlamaForCausalLM",
    ]
    texts += ["hidden_size", "transformers", "lingualinked", "attic-nas", "cellar-pi", "checkpoint", "torch"]
    texts += ["StartWorker", "LoadStage", "HostFacts", "IntroduceWorker", "StepDone", "Linux"]
    return found | {text: text.encode() for text in texts}


def _packed(number: int) -> bytes:
    return bytes([number]) if number < 128 else b"\xcd" + number.to_bytes(2) if number > 255 else bytes([0xCC, number])


def test_without_a_key_nothing_is_said_but_the_handshake(lab: Lab) -> None:
    stranger = lab.network.add("stranger")
    lab.open()
    ports = [(daemon.host.address, port) for daemon in lab.daemons for port in listening_ports(daemon.host)]
    assert len(ports) > len(lab.daemons)  # the workers listen too
    with lab.network.capture() as capture:
        with stranger.start_python(KNOCK, json.dumps(ports), lab.daemons[0].public_key) as program:
            assert program.hear() == "no answer"
        assert lab.tokens() == lab.tokens()
    answers = {flow: stream for flow, stream in capture.flows().items() if flow.target == stranger.address}
    assert len(answers) >= 3 * len(ports)
    for flow, stream in answers.items():
        frames = frames_of(stream)
        assert all(frame.is_command for frame in frames), f"{flow} sent a message: {frames}"
        assert {frame.command for frame in frames} <= {"WELCOME", "ERROR"}, f"{flow}: {frames}"


KNOCK = """
import json, sys, time
import zmq
ports, server_key = json.loads(sys.argv[1]), sys.argv[2].encode()
context = zmq.Context()
poller = zmq.Poller()
for host, port in ports:
    for kind in (zmq.DEALER, zmq.PUSH, zmq.SUB):
        for mechanism in ("curve", "null", "plain"):
            socket = context.socket(kind)
            socket.linger = 0
            if mechanism == "curve":
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                socket.curve_serverkey = server_key
            elif mechanism == "plain":
                socket.plain_username, socket.plain_password = b"admin", b"admin"
            if kind == zmq.SUB:
                socket.subscribe(b"")
            socket.connect(f"tcp://{host}:{port}")
            if kind != zmq.SUB:
                socket.send(b"let me in", zmq.DONTWAIT)
            if kind != zmq.PUSH:
                poller.register(socket, zmq.POLLIN)
print(json.dumps("an answer" if poller.poll(4000) else "no answer"), flush=True)
context.destroy(0)
"""


def listening_ports(host: Host) -> list[int]:
    """Return the TCP ports at which a host can be reached from others."""
    listening = namespaces.ip("netns", "exec", host.namespace, "ss", "-Hltn")
    addresses = [line.split()[3] for line in listening.splitlines()]
    return [int(address.rpartition(":")[2]) for address in addresses if not address.startswith("127.")]


def test_2000_half_open_connections_disturb_no_session(lab: Lab, uncut: Uncut) -> None:
    flooder = lab.network.add("flooder")
    lab.open()
    expected = uncut.tokens(12)
    daemon = lab.daemons[0]
    ports = listening_ports(daemon.host)
    assert len(ports) == 2  # the daemon's and its worker's
    for first_bytes, port in zip((b"", GREETING), ports, strict=True):
        listener = psutil.Process(_pid_listening(daemon.host, port))
        before = most = listener.num_fds()
        with half_open(flooder, daemon.host.address, port, 2000, first_bytes):
            for _ in range(3):
                assert lab.tokens() == expected
                most = max(most, listener.num_fds())
        log.info(f"port {port}: {before} descriptors became {most}")
        assert most - before <= 600
        wait_until(lambda: listener.num_fds() <= before + 5)  # noqa: B023 - called here
    assert daemon.program.process.poll() is None


def _pid_listening(host: Host, port: int) -> int:
    listening = namespaces.ip("netns", "exec", host.namespace, "ss", "-Hltnp", f"sport = :{port}")
    return int(listening.split("pid=")[1].split(",")[0])

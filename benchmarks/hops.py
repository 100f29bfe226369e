"""``python -m benchmarks hops``: what a hop between two processes costs through shared memory, and over an encrypted socket.

Knows mailboxes and the public face; alternates both ways in one run. As a program, it is the process at the other end.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lingualinked as ll
from lingualinked.cli.bench.shapes import LLAMA_160M
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.model.process.memory import use_one_heap
from lingualinked.quantities import bytes_text
from lingualinked.tables import Rows
from lingualinked.transport.keys.keys import KeyPair, generate_keypair
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

_WAYS = {"socket": False, "shared memory": True}
_NUM_WARM = 4  # rounds before those that count: in the first one, the memory is offered

PREFILL = {
    **LLAMA_160M,
    "num_hidden_layers": 2,
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 1000,
}
"""Computes little for a hidden state of 8 KiB a token."""

DECODE = {
    **LLAMA_160M,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
}
"""Computes little for logits of 250 KiB a token."""


def run_hops(sizes: tuple[int, ...], repeats: int, accelerator: str) -> None:
    """Print the time of a hop for each size, then of a prefill and of decoding, both ways."""
    torch.set_num_threads(1)
    console = new_console()
    console.print(_measure_hops(sizes, 20 * repeats, accelerator))
    console.print(_measure_models(repeats, accelerator))


def _measure_hops(sizes: tuple[int, ...], num_rounds: int, accelerator: str) -> Rows:
    rows = []
    with _echoing_process() as boxes:
        for size in sizes:
            tensor = torch.randint(0, 255, (size,), dtype=torch.uint8, device=accelerator)
            expected = tensor.cpu()

            def hop_us(way: str, tensor: torch.Tensor = tensor, expected: torch.Tensor = expected) -> float:
                began_s = time.perf_counter()
                boxes[way].send("echo", b"x", [tensor])
                answer = boxes[way].receive(60)
                hop_s = (time.perf_counter() - began_s) / 2
                if answer is None or not torch.equal(answer.tensors[0], expected):
                    raise ll.LingualinkedError("a tensor came back changed, or not at all: please report this")
                return hop_s * 1e6

            rows.append((bytes_text(size), *_compare(hop_us, num_rounds, 0)))
    return Rows(f"One hop, µs, medians and quartiles of {num_rounds}", ("tensor", *_WAYS, "ratio"), rows)


def _compare(measure: Callable[[str], float], num_rounds: int, digits: int) -> tuple[str, str, str]:
    """Measure both ways in turn; return the median and the quartiles of each way and of the ratio of each round."""
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    for number in range(_NUM_WARM + num_rounds):
        for way in _WAYS if number % 2 else reversed(_WAYS):
            value = measure(way)
            if number >= _NUM_WARM:
                times[way].append(value)
    socket, shared = (Repeats(times[way]) for way in _WAYS)
    return _quartiles(socket, digits), _quartiles(shared, digits), _quartiles(ratios(socket, shared), 2)


def _quartiles(values: Repeats, digits: int) -> str:
    low, _, high = statistics.quantiles(values.values, n=4)
    return f"{values.median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _measure_models(repeats: int, accelerator: str) -> Rows:
    with contextlib.ExitStack() as stack:
        clusters = {
            way: stack.enter_context(
                ll.Cluster(
                    [ll.Device(name=name, threads=1, accelerator=accelerator) for name in "ab"],
                    shared_memory=shared_memory,
                )
            )
            for way, shared_memory in _WAYS.items()
        }

        def load(shape: dict[str, Any]) -> dict[str, Any]:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            (Path(folder) / "config.json").write_text(json.dumps(shape))
            options: dict[str, Any] = {"plan": "even", "load_format": "dummy", "progress": False}
            return {
                way: stack.enter_context(ll.ShardedModel.from_pretrained(folder, cluster=cluster, **options))
                for way, cluster in clusters.items()
            }

        long, large = load(PREFILL), load(DECODE)
        ids = torch.randint(3, 1000, (1, 512))
        pasts = {way: model(ids[:, :16]).past_key_values for way, model in large.items()}

        def prefill_ms(way: str) -> float:
            began_s = time.perf_counter()
            long[way](ids, logits_to_keep=1)
            return (time.perf_counter() - began_s) * 1e3

        def step_ms(way: str) -> float:
            began_s = time.perf_counter()
            large[way](ids[:, :1], past_key_values=pasts[way])
            return (time.perf_counter() - began_s) * 1e3

        rows = [
            ("prefill of 512 tokens, hidden size 4,096", *_compare(prefill_ms, 4 * repeats, 0)),
            ("decode step, vocabulary of 128,256", *_compare(step_ms, 20 * repeats, 1)),
        ]
    return Rows("Two workers, bfloat16, ms, medians and quartiles", ("what", *_WAYS, "ratio"), rows)


@contextlib.contextmanager
def _echoing_process() -> Any:
    """Start a process that sends back what it receives; yield a mailbox for each way to it."""
    keys = {way: (generate_keypair(), generate_keypair()) for way in _WAYS}
    with contextlib.ExitStack() as stack:
        boxes = {
            way: stack.enter_context(ZmqMailbox("here", keys[way][0], shared_memory=shared))
            for way, shared in _WAYS.items()
        }
        peer = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.hops"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        stack.callback(peer.kill)
        assert peer.stdin is not None
        assert peer.stdout is not None
        for way, box in boxes.items():
            mine, theirs = keys[way]
            box.authorise("echo", theirs.public)
            peer.stdin.write(json.dumps([way, mine.public, box.address, theirs.public, theirs.secret]) + "\n")
            peer.stdin.flush()
            box.connect("echo", json.loads(peer.stdout.readline()), theirs.public)
        yield boxes


def _echo(way: str, key: str, address: str, public: str, secret: str) -> None:
    with ZmqMailbox("echo", KeyPair(public, secret), shared_memory=_WAYS[way]) as box:
        box.authorise("here", key)
        box.connect("here", address, key)
        sys.stdout.write(json.dumps(box.address) + "\n")
        sys.stdout.flush()
        while (delivery := box.receive(None)) is not None:
            box.send("here", b"x", delivery.tensors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    use_one_heap()  # as workers do
    for _ in _WAYS:
        threading.Thread(target=_echo, args=json.loads(sys.stdin.readline())).start()

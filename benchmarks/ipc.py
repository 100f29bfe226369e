"""``python -m benchmarks ipc``: the bare exchange of memory that two processes on one GPU share: the measure for hops between workers.

Knows torch alone. As a program, it is the process at the other end.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from typing import IO, Any

import torch
from torch import Tensor

from lingualinked.cli.repeats import Repeats
from lingualinked.console import new_console
from lingualinked.quantities import bytes_text
from lingualinked.tables import Rows

_NUM_WARM, _NUM_ROUNDS = 20, 200


def run_ipc(sizes: tuple[int, ...], repeats: int, accelerator: str) -> None:
    """Print the time of a hop for each size: a copy into shared memory, a byte through a pipe, and a copy out of it."""
    lines = [
        (bytes_text(size), Repeats([_hop_us(size, accelerator) for _ in range(repeats)]).text(0, " µs"))
        for size in sizes
    ]
    new_console().print(Rows(f"A bare hop between two processes on {accelerator}", ("size", "time"), lines))


def _hop_us(num_bytes: int, accelerator: str) -> float:
    """Exchange a tensor to and fro; return microseconds of a hop."""
    tensors = [torch.ones(num_bytes, dtype=torch.uint8, device=accelerator) for _ in range(2)]
    process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        handles = {"accelerator": accelerator, "size": num_bytes, "tensors": [_share(tensor) for tensor in tensors]}
        process.stdin.write(json.dumps(handles).encode() + b"\n")
        process.stdin.flush()
        own = torch.zeros_like(tensors[0])
        there, back = tensors
        elapsed_s = []
        for _ in range(_NUM_WARM + _NUM_ROUNDS):
            began_s = time.perf_counter()
            _copy(there, own)
            _signal(process.stdin)
            _await(process.stdout)
            _copy(own, back)
            elapsed_s.append(time.perf_counter() - began_s)
        process.stdin.close()
        process.wait(30)
    return 1e6 * Repeats(elapsed_s[_NUM_WARM:]).median / 2


def main() -> None:
    """Answer each signal: copy what has come, and copy it back."""
    handles = json.loads(_read_line())
    there, back = (_open(each, handles["accelerator"], handles["size"]) for each in handles["tensors"])
    own = torch.zeros_like(there)
    while os.read(0, 1):
        _copy(own, there)
        _copy(back, own)
        os.write(1, b"!")


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
    if target.is_cuda:
        torch.cuda.synchronize(target.device)


def _read_line() -> bytes:
    """Read a line of standard input, and nothing behind it."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    return line


def _signal(pipe: IO[bytes]) -> None:
    os.write(pipe.fileno(), b"!")


def _await(pipe: IO[bytes]) -> None:
    if not os.read(pipe.fileno(), 1):
        raise RuntimeError("the process at the other end has ended")


def _share(tensor: Tensor) -> list[Any]:
    storage: Any = tensor.untyped_storage()
    shared = storage._share_cuda_() if tensor.is_cuda else storage._share_filename_cpu_()
    return [["bytes", base64.b64encode(each).decode()] if isinstance(each, bytes) else each for each in shared]


def _open(handle: list[Any], accelerator: str, num_bytes: int) -> Tensor:
    shared = [base64.b64decode(each[1]) if isinstance(each, list) else each for each in handle]
    storage: Any = torch.UntypedStorage
    is_cuda = accelerator.startswith("cuda")
    if is_cuda:
        torch.cuda.init()
    opened = storage._new_shared_cuda(*shared) if is_cuda else storage._new_shared_filename_cpu(*shared)  # noqa: SLF001
    tensor: Any = torch.empty(0, dtype=torch.uint8, device=accelerator)
    opened_tensor: Tensor = tensor.set_(opened, 0, (num_bytes,))
    return opened_tensor


if __name__ == "__main__":
    main()

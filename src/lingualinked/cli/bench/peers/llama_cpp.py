"""llama.cpp over RPC: a server of one thread for each stage, and its own benchmarks as the caller.

Knows its programs and its files' format; the weights are random, in the shape of the model.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lingualinked.cli.bench.timing import Kind
from lingualinked.errors import ArgumentError

_SERVER, _BENCH, _BATCHED = "ggml-rpc-server", "llama-bench", "llama-batched-bench"
_START_S = 20.0
_RUN_S = 600.0
_MOST_TRIES = 5
_BLOCK = 1 << 20  # random values that weights repeat


class LlamaCpp:
    """Servers that run until `close`, with one thread each, cut where the sharded model is cut."""

    def __init__(
        self, folder: Path | None, gguf_path: Path, layers: Sequence[int], cores: Sequence[Sequence[int]]
    ) -> None:
        self._programs = check_programs(folder)
        self._gguf_path = gguf_path
        self._ports = [_free_port() for _ in layers]
        self._split = "/".join(str(number + (index == len(layers) - 1)) for index, number in enumerate(layers))
        self._servers: list[subprocess.Popen[bytes]] = []
        try:
            for port, pinned in zip(self._ports, cores, strict=True):
                self._servers.append(_start_server(self._programs[_SERVER], port, pinned))
        except BaseException:
            self.close()
            raise

    def tokens_per_s(self, kind: Kind, rows: int, prompt_tokens: int, new_tokens: int) -> float:
        """Return tokens per second: of a prompt, after it, or of whole answers to so many clients at once."""
        if rows == 1 and kind != "throughput":
            counts = (prompt_tokens, 0, 0) if kind == "prefill" else (0, new_tokens, prompt_tokens)
            arguments = [text for each in zip(("-p", "-n", "-d"), map(str, counts), strict=True) for text in each]
            (row,) = json.loads(self._run(_BENCH, "-r", "1", "-o", "json", *arguments))
            return float(row["avg_ts"])
        row = self._run_batched(rows, prompt_tokens, max(1, new_tokens))
        return float(row["speed_tg"] if kind == "decode" else rows * new_tokens / row["t"])

    def _run_batched(self, rows: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        shape = ("-npp", prompt_tokens, "-ntg", new_tokens, "-npl", rows, "-c", rows * (prompt_tokens + new_tokens))
        for _ in range(_MOST_TRIES):  # what it says last is lost now and then, when its logging thread ends too early
            text = self._run(_BATCHED, "--output-format", "jsonl", *map(str, shape))
            for line in text.splitlines():
                if line.startswith("{"):
                    row: dict[str, float] = json.loads(line)
                    return row
        raise ArgumentError(f"{_BATCHED} says nothing: try it by itself")

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.terminate()
            server.wait(10)

    def _run(self, name: str, *arguments: str) -> str:
        servers = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        command = [self._programs[name], "-m", str(self._gguf_path), "-t", "1", "-ngl", "99", "-ts", self._split]
        done = subprocess.run(
            [*command, "--rpc", servers, *arguments], capture_output=True, text=True, check=False, timeout=_RUN_S
        )
        if done.returncode != 0:
            raise ArgumentError(f"{name} has failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return done.stdout


def check_programs(folder: Path | None) -> dict[str, str]:
    """Return the paths of llama.cpp's programs by name, in a folder if one is given, else on PATH."""
    found = {}
    for name in (_SERVER, _BENCH, _BATCHED):
        path = shutil.which(name, path=None if folder is None else str(folder))
        if path is None:
            where = "on PATH" if folder is None else f"in {folder}"
            raise ArgumentError(
                f"--against llama.cpp needs its program {name}, which is not {where}: build llama.cpp with -DGGML_RPC=ON "
                "and name the folder of its programs with --llama-cpp, or leave llama.cpp out"
            )
        found[name] = path
    return found


def write_gguf(config: Any, path: Path) -> None:
    """Write a Llama of random bfloat16 weights, norms of ones in float32, in the shape of a config."""
    try:
        import gguf
    except ImportError as error:
        raise ArgumentError("--against llama.cpp needs gguf: pip install gguf, or leave it out") from error

    if config.model_type != "llama":
        raise ArgumentError(
            f"--against llama.cpp takes shapes of Llamas, and this is a {config.model_type}: leave it out"
        )
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    head = hidden // config.num_attention_heads
    key = head * config.num_key_value_heads
    # 1) describe the model
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # 2) name its tensors
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, hidden)}
    for index in range(config.num_hidden_layers):
        layer = {
            "attn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (key, hidden),
            "attn_v": (key, hidden),
            "attn_output": (hidden, hidden),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {"output_norm": (hidden,), "output": (vocabulary, hidden)}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), 4 * hidden)
        else:
            size = 2 * shape[0] * shape[1]
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor_info(f"{name}.weight", (shape[0], 2 * shape[1]), np.dtype(np.uint8), size, raw_dtype=kind)
    # 3) write them
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    block = np.float32(0.02) * np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
    values = (block.view(np.uint32) >> 16).astype(np.uint16)
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            writer.write_tensor_data(np.resize(values, shape).view(np.uint8))
    writer.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_server(program: str, port: int, cores: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a server pinned to some cores, and wait until it listens."""
    server = subprocess.Popen(
        [program, "-t", "1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if cores:
        psutil.Process(server.pid).cpu_affinity(list(cores))
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.05)
    server.kill()
    server.wait()
    raise ArgumentError(f"{program} does not listen on port {port}: try it by itself")

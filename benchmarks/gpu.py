"""``python -m benchmarks gpu``: decode speed of two workers on one GPU, against one process: eager, compiled, and as a CUDA graph.

Knows the public face and the unsharded model with the same weights; alternates all sides in one process.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import lingualinked as ll
from lingualinked.cli.bench import shapes
from lingualinked.cli.bench.timing import decode_tokens_per_s
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.model.weights.dummy import DummyWeights
from lingualinked.tables import Rows

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**shapes.LLAMA_160M, "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
             "num_key_value_heads": 4},
    "llama-1b": shapes.SHAPES["1b"],
    "llama-8b": shapes.SHAPES["8b"],
}  # fmt: skip
"""TinyLlama-1.1B, and Llama-3.1-8B but for its rotary embeddings."""

ROWS = {
    "eager": "unsharded, eager, growing KV",
    "compiled": "unsharded, static KV: transformers compiles it",
    "graph": "unsharded, static KV, a CUDA graph of the eager step",
    "workers": "2 workers, growing KV",
    "workers-static": "2 workers, static KV",
}
"""What is measured, by the names of the option."""

_COPY_BYTES = 1 << 30


def run_gpu(
    shape: str,
    accelerator: str,
    rows: tuple[str, ...],
    *,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    time_limit_s: float,
) -> None:
    """Print the speed of each row, its ratio to the others, and whether its tokens are those of the same KV unsharded."""
    deadline_s = time.monotonic() + time_limit_s
    torch.set_num_threads(1)
    console = new_console()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        # 1) load the model here and in the workers, at the same time
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        began_s = time.monotonic()
        loading = pool.submit(unsharded_on, folder, accelerator)
        sharded: Any = None
        if any(row.startswith("workers") for row in rows):
            devices = [ll.Device(name=name, threads=1, accelerator=accelerator) for name in ("first", "second")]
            cluster = stack.enter_context(ll.Cluster(devices))
            sharded = stack.enter_context(
                ll.ShardedModel.from_pretrained(
                    folder, cluster=cluster, plan="even", load_format="dummy", progress=False
                )
            )
        unsharded = loading.result()
        console.print(
            f"{shape} on {_describe(accelerator)}; loaded in {time.monotonic() - began_s:.0f} s", highlight=False
        )
        # 2) let each side warm up, and keep its tokens
        torch.manual_seed(0)
        ids = torch.randint(3, SHAPES[shape]["vocab_size"], (batch, prompt_tokens))
        every: dict[str, Any] = {
            "eager": _Here(unsharded, accelerator),
            "compiled": _Here(unsharded, accelerator, cache_implementation="static"),
            "graph": GraphLoop(unsharded, accelerator, prompt_tokens + new_tokens - 1),
            "workers": _Here(sharded, "cpu"),
            "workers-static": _Here(sharded, "cpu", cache_implementation="static"),
        }
        sides = {row: every[row] for row in rows}
        tokens: dict[str, Tensor] = {}
        for row, side in list(sides.items()):
            if time.monotonic() > deadline_s:
                console.print(f"{row}: left out, the time is over", highlight=False)
                del sides[row]
                continue
            began_s = time.monotonic()
            for _ in range(2):
                tokens[row] = side.generate(ids, max_new_tokens=new_tokens, do_sample=False)[:, prompt_tokens:]
            console.print(f"{row}: warmed up in {time.monotonic() - began_s:.1f} s", highlight=False)
        # 3) measure by turns
        speeds: dict[str, list[float]] = {row: [] for row in sides}
        for _ in range(repeats):
            for row, side in sides.items():
                speeds[row].append(decode_tokens_per_s(side, ids, new_tokens, attention_mask=None))
            if time.monotonic() > deadline_s:
                break
        copied = Repeats([_copy_bytes_per_s(accelerator) for _ in range(5)])
        console.print(_table(speeds, tokens, unsharded, copied, f"{batch} x {prompt_tokens} + {new_tokens} tokens"))


def unsharded_on(folder: str, device: str) -> Any:
    """Make the unsharded model on a device, with the weights that ``load_format="dummy"`` fills."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    weights = DummyWeights(model, 0)
    model.to_empty(device=device)
    # What no weight fills is computed on the CPU, as everywhere; another device may round it differently.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    parameters = dict(model.named_parameters())
    with ThreadPoolExecutor(8) as pool, torch.no_grad():
        for name, filled in zip(weights.shapes, pool.map(weights.read_tensor, weights.shapes), strict=True):
            parameters[name].copy_(filled)
    return model.eval()


class _Here:
    """Calls a model with tokens where it takes them, and some fixed arguments."""

    def __init__(self, model: Any, device: str, **arguments: Any) -> None:
        self._model, self._device, self._arguments = model, device, arguments

    def generate(self, ids: Tensor, **arguments: Any) -> Tensor:
        """Return prompt and tokens, on the CPU."""
        tokens: Tensor = self._model.generate(ids.to(self._device), **self._arguments, **arguments)
        return tokens.cpu()


class GraphLoop:
    """Greedy decoding that replays a CUDA graph of the model's own eager step with a static KV cache; on a CPU, just the step."""

    def __init__(self, model: Any, device: str, max_cache_len: int) -> None:
        self._model, self._device = model, device
        self._cache = StaticCache(config=model.config, max_cache_len=max_cache_len)
        self._token = torch.zeros(0)
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, streamer: Any = None, **_arguments: Any) -> Tensor:
        """Return prompt and tokens, on the CPU; each token is read there before the next step, as ``generate`` does."""
        if self._replay is None:
            self._prefill(ids)
            self._replay = self._capture()
        text = [ids, self._prefill(ids)]
        if streamer is not None:
            streamer.put(ids)
            streamer.put(text[-1])
        for _ in range(max_new_tokens - 1):
            self._replay()
            text.append(self._token.clone().cpu())
            if streamer is not None:
                streamer.put(text[-1])
        return torch.cat(text, dim=1)

    def _prefill(self, ids: Tensor) -> Tensor:
        self._cache.reset()
        logits = self._model(ids.to(self._device), past_key_values=self._cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        if self._replay is None:
            self._token = token
        self._token.copy_(token)
        return self._token.clone().cpu()

    def _step(self) -> None:
        logits = self._model(self._token, past_key_values=self._cache, logits_to_keep=1).logits
        self._token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def _capture(self) -> Callable[[], None]:
        if not self._device.startswith("cuda"):
            return self._step
        stream: Any = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are loaded and chosen
                self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        replay: Callable[[], None] = graph.replay
        return replay


def _table(
    speeds: dict[str, list[float]], tokens: dict[str, Tensor], unsharded: Any, copied: Repeats, title: str
) -> Rows:
    """Tabulate the speeds; ratios are of pairs, and the share is of the speed at which memory is copied."""
    num_bytes = sum(each.weight.nbytes for each in unsharded.modules() if isinstance(each, torch.nn.Linear))
    batch = len(next(iter(tokens.values())))
    against = [row for row in ("eager", "compiled", "graph") if row in speeds]
    lines = []
    for row, values in speeds.items():
        ours = Repeats(values)
        reference = "graph" if row in ("compiled", "workers-static") else "eager"
        lines.append(
            (
                ROWS[row],
                ours.text(1),
                *(ratios(ours, Repeats(speeds[other])).text(2) for other in against),
                f"{num_bytes * ours.median / batch / copied.median:.2f}",
                _agreement(tokens[row], tokens.get(reference), reference),
            )
        )
    columns = ("what", "tokens/s", *(f"over {other}" for other in against), "share of memory", "equal tokens")
    notes = (
        f"memory copies {copied.median / 1e9:.0f} GB/s, read and written; a token reads {num_bytes / 1e9:.2f} GB of weights",
    )
    return Rows(title, columns, lines, notes=notes)


def _agreement(ours: Tensor, theirs: Tensor | None, name: str) -> str:
    """Say how many tokens of each row, from the first on, are those of the reference."""
    if theirs is None:
        return ""
    equal = (ours == theirs).long().cumprod(1).sum(1)
    return f"{int(equal.min())} of {ours.shape[1]} ({name})"


def _copy_bytes_per_s(device: str) -> float:
    """Return the speed of a large copy on the device, counting bytes read and bytes written."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _wait(device)
    began_s = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    _wait(device)
    return 10 * 2 * _COPY_BYTES / (time.perf_counter() - began_s)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _describe(accelerator: str) -> str:
    return torch.cuda.get_device_name(accelerator) if accelerator.startswith("cuda") else accelerator

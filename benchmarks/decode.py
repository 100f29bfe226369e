"""``python -m benchmarks decode``: speed of sharded models against the same unsharded one, and whether their tokens are equal.

Knows the public face and the unsharded model with the same weights; alternates the two in one process.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lingualinked as ll
from benchmarks.overhead import SHAPE, VOCABULARY, tokens_per_s, unsharded_dummy
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.model.exact.linear_speed import measure_memory
from lingualinked.tables import Rows

SHAPES = {
    "160m": {**SHAPE, "intermediate_size": 2048},
    "1b": {
        **SHAPE,
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
"""Shapes of small Llamas: JackFram/llama-160m and TinyLlama-1.1B."""

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one stream": (1, 16, {}),
    "context 2,048": (1, 2048, {}),
    "4 beams": (1, 16, {"num_beams": 4}),
    "8 rows": (8, 16, {}),
    "16 rows": (16, 16, {}),
}
"""Rows, tokens of a prompt, and how they are decoded."""


def run_decode(shape: str, dtype: str, num_workers: int, cases: tuple[str, ...], new_tokens: int, repeats: int) -> None:
    """Print a table of speeds and ratios for each number of the unsharded model's threads."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        (Path(folder) / "config.json").write_text(json.dumps({**SHAPES[shape], "torch_dtype": dtype}))
        cluster = stack.enter_context(
            ll.Cluster([ll.Device(name=f"worker-{index}", threads=1) for index in range(num_workers)])
        )
        sharded = stack.enter_context(
            ll.ShardedModel.from_pretrained(folder, cluster=cluster, plan="even", load_format="dummy", progress=False)
        )
        unsharded = unsharded_dummy(folder, dtype)
        console = new_console()
        console.print(f"{shape}, {dtype}, {num_workers} workers x 1 thread, {new_tokens} tokens, medians of {repeats}")
        for threads in (1, 2):
            rows = [(case, *_compare(sharded, unsharded, threads, CASES[case], new_tokens, repeats)) for case in cases]
            if threads == 1:
                rows.append(("prefill of 512", *_prefill(sharded, unsharded, repeats)))
            columns = ("what", "sharded, tokens/s", "unsharded, tokens/s", "ratio", "tokens equal")
            console.print(Rows(f"Against the unsharded model with {threads} thread(s)", columns, rows))
        console.print(_share_of_memory(sharded, unsharded, new_tokens, repeats))


def _compare(
    sharded: Any, unsharded: Any, threads: int, case: tuple[int, int, dict[str, Any]], new_tokens: int, repeats: int
) -> tuple[str, str, str, str]:
    num_rows, context, arguments = case
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (num_rows, context))
    call: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, **arguments}
    measure = tokens_per_s if not arguments else _whole_tokens_per_s
    speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with _threads(1):
        equal = torch.equal(sharded.generate(ids, **call), unsharded.generate(ids, **call))
    for _ in range(repeats):
        speeds["ours"].append(num_rows * measure(sharded, ids, **call))
        with _threads(threads):
            speeds["theirs"].append(num_rows * measure(unsharded, ids, **call))
    return (*_texts(speeds), str(equal))


def _prefill(sharded: Any, unsharded: Any, repeats: int) -> tuple[str, str, str, str]:
    ids = torch.randint(3, VOCABULARY, (1, 512))
    speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with torch.inference_mode():
        equal = torch.equal(sharded(ids, logits_to_keep=1).logits, unsharded(ids, logits_to_keep=1).logits)
        for _ in range(repeats):
            for side, model in (("ours", sharded), ("theirs", unsharded)):
                began_s = time.perf_counter()
                model(ids, logits_to_keep=1)
                speeds[side].append(512 / (time.perf_counter() - began_s))
    return (*_texts(speeds), str(equal))


def _share_of_memory(sharded: Any, unsharded: Any, new_tokens: int, repeats: int) -> str:
    """Say how fast weights are read while one stream is decoded, beside the speed at which one thread reads memory."""
    num_bytes = sum(each.weight.nbytes for each in unsharded.modules() if isinstance(each, torch.nn.Linear))
    ids = torch.randint(3, VOCABULARY, (1, 16))
    decoding, memory = [], []
    for _ in range(repeats):
        speed = tokens_per_s(sharded, ids, max_new_tokens=new_tokens, do_sample=False)
        decoding.append(num_bytes * speed / 1e9)
        memory.append(measure_memory() / 1e9)
    share = ratios(Repeats(decoding), Repeats(memory))
    return f"weights: {Repeats(decoding).text(1)} GB/s, memory: {Repeats(memory).text(1)} GB/s, share {share.text(2)}"


def _whole_tokens_per_s(model: Any, ids: torch.Tensor, **call: Any) -> float:
    """Return the speed of a whole call: beam search streams nothing."""
    began_s = time.perf_counter()
    model.generate(ids, **call)
    return float(call["max_new_tokens"]) / (time.perf_counter() - began_s)


def _texts(speeds: dict[str, list[float]]) -> tuple[str, str, str]:
    ours, theirs = Repeats(speeds["ours"]), Repeats(speeds["theirs"])
    return ours.text(1), theirs.text(1), ratios(ours, theirs).text(2)


@contextlib.contextmanager
def _threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

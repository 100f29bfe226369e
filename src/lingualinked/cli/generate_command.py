"""``lingualinked generate``: continues one prompt with any checkpoint.

Knows the public API; prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lingualinked as ll
from lingualinked.cli.devices_option import read_devices


def run_generate(
    path: str,
    prompt: str,
    devices: str,
    dtype: str,
    seed: int | None,
    *,
    raw: bool,
    progress: bool,
    **options: Any,
) -> None:
    """Load a checkpoint into workers and stream the answer; with ``raw``, the prompt and special tokens too."""
    asked = read_devices(devices)
    tokenizer = read_tokenizer(path)
    inputs = encode(tokenizer, prompt)
    with (
        ll.Cluster(asked) as cluster,
        ll.ShardedModel.from_pretrained(path, cluster=cluster, dtype=dtype, progress=progress) as model,
    ):
        import torch
        from transformers import TextStreamer

        if seed is not None:
            torch.manual_seed(seed)
        streamer = TextStreamer(tokenizer, skip_prompt=not raw, skip_special_tokens=not raw)
        model.generate(**inputs, streamer=streamer, **options)


def encode(tokenizer: Any, text: str) -> Any:
    """Tokenize a text, which must have tokens, into input ids and a mask."""
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ll.ArgumentError(f"the prompt {text!r} has no tokens: give a text to continue")
    return inputs


def read_tokenizer(path: str) -> Any:
    """Read the tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    from lingualinked.model.weights.checkpoint import check_fetched  # imports torch

    if path.startswith(("/", ".")) and not Path(path).exists():
        raise ll.CheckpointError(f"there is no checkpoint at {path!r}: give a folder with config.json, or a hub id")
    check_fetched(Path(path))
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ll.CheckpointError(f"no tokenizer at {path!r}: {error}") from error

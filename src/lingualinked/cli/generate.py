"""``lingualinked generate``: continue one prompt with any checkpoint.

Knows the public face, and prints.
"""

from __future__ import annotations

from typing import Any

import lingualinked as ll


def run_generate(path: str, prompt: str, num_devices: int, dtype: str, seed: int | None, **options: Any) -> None:
    """Load a checkpoint into workers and stream the continuation."""
    with ll.ShardedModel.from_pretrained(path, devices=num_devices, dtype=dtype) as model:
        import torch
        from transformers import TextStreamer

        tokenizer = read_tokenizer(path)
        if seed is not None:
            torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        model.generate(**inputs, streamer=TextStreamer(tokenizer), **options)


def read_tokenizer(path: str) -> Any:
    """Read the tokenizer of a checkpoint.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ll.CheckpointError(f"no tokenizer at {path!r}: {error}") from error

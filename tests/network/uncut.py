"""A checkpoint, and the uncut model of it: what it generates, and how many bytes its tensors have.

Knows transformers and the files; no network.
"""

from __future__ import annotations

import json
import struct
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from process.conftest import load_unsharded

PROMPT = [1, 705, 33, 512, 999, 18, 250, 77, 640, 401, 86, 911]
"""Token ids of no pattern: as bytes they occur nowhere by chance."""


class Uncut:
    """The reference of a test.

    Parameters
    ----------
    folder : Path
        Of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in this process."""
        return load_unsharded(str(self.folder))

    def tokens(self, num_new: int, prompt: list[int] = PROMPT) -> list[int]:
        """Return what the model generates, greedily, the prompt included."""
        generated = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
        )
        return [int(token) for token in generated[0]]

    @cached_property
    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of each tensor, by its name in the file."""
        with (self.folder / "model.safetensors").open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}

    def span_bytes(self, start: int, end: int) -> int:
        """Return the bytes of the tensors of layers ``[start, end)``, with embeddings and head where they belong."""
        num_layers = self.model.config.num_hidden_layers
        beginnings = [f"model.layers.{layer}." for layer in range(start, end)]
        beginnings += ["model.embed_tokens."] if start == 0 else []
        beginnings += ["model.norm.", "lm_head."] if end == num_layers else []
        return sum(size for name, size in self.tensor_bytes.items() if name.startswith(tuple(beginnings)))


def save_random_llama(folder: Path, *, hidden_size: int, intermediate_size: int) -> Path:
    """Write a Llama of 8 layers with random weights."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder

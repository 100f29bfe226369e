"""Tiny random encoder-decoder models, with stacks of different depths; every parameter of a checkpoint is random.

Knows configurations, and how to save them as checkpoints; nothing of what is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, PreTrainedModel

from accelerators import on_accelerator

VOCABULARY = 97
NUM_LAYERS = {"encoder": 5, "decoder": 4}  # generate of T5 fails if its decoder is deeper than its encoder

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BART = {
    "d_model": 32,
    "encoder_layers": NUM_LAYERS["encoder"],
    "decoder_layers": NUM_LAYERS["decoder"],
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": NUM_LAYERS["encoder"],
    "num_decoder_layers": NUM_LAYERS["decoder"],
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}

# name: (model type, arguments beyond the common ones)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "t5-gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "bart": ("bart", _BART),
    "blenderbot": ("blenderbot", _BART),
    "mbart": ("mbart", _BART),
    "pegasus": ("pegasus", _BART),
    "marian": ("marian", {**_BART, "decoder_vocab_size": VOCABULARY}),
    "m2m-100": ("m2m_100", {**_BART, "scale_embedding": True}),
}


def save_tiny(family: str, dtype: torch.dtype, folder: Path) -> Path:
    """Save the tiny model of a family as a checkpoint, without the positions that its class computes."""
    model_type, arguments = FAMILIES[family]
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[model_type](**(_COMMON | arguments)), dtype=dtype)
    generator = torch.Generator().manual_seed(sum(family.encode()))
    computed = "embed_positions" if family in ("marian", "pegasus") else "none of them"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if computed not in name:
                noise = torch.empty(parameter.shape).normal_(std=0.15, generator=generator)
                parameter.copy_(noise + (parameter if parameter.ndim == 1 else 0))
    model.save_pretrained(folder)
    return folder


def reference(folder: Path) -> PreTrainedModel:
    """Load a checkpoint unsharded, its parameters cloned: mapped ones are not aligned, which shifts the last bits."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return on_accelerator(model.eval())


def sources(num_rows: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make source texts [rows, tokens] and their mask, always the same: of several, the last is padded at its end."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_tokens)
    tokens = torch.randint(3, VOCABULARY, (num_rows, num_tokens), generator=generator)
    mask = torch.ones_like(tokens)
    if num_rows > 1:
        mask[-1, num_tokens // 2 :] = 0
    tokens[mask == 0] = 0
    return tokens, mask

"""The built-in shapes of ``lingualinked bench``: configs of well-known models, filled with random weights.

Knows configs; no weights.
"""

from __future__ import annotations

from typing import Any

LLAMA_160M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""JackFram/llama-160m, from which the other Llamas differ in few fields."""

SHAPES: dict[str, dict[str, Any]] = {
    "160m": LLAMA_160M,
    "1b": {
        **LLAMA_160M,
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "8b": {
        **LLAMA_160M,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "bloom-560m": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": 24,
        "hidden_size": 1024,
        "n_head": 16,
        "vocab_size": 250880,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 3,
    },
}
"""JackFram/llama-160m, TinyLlama-1.1B, Llama-3.1-8B but for its rotary embeddings, and bigscience/bloom-560m."""

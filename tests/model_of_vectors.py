"""A small model whose rows fill a processor's vectors, and whose products of one row have other bits than those of several.

Knows stages; no workers.
"""

from __future__ import annotations

from transformers import LlamaConfig

from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage

NUM_LAYERS = 4


def config_of_vectors(**changes: object) -> LlamaConfig:
    """Configure it; products along more than 1,024 inputs are added up in other pieces for one row."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 2048,
        "vocab_size": 320,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(sizes | changes))  # type: ignore[arg-type]


def spec_of_vectors(dtype: str = "bfloat16", **changes: object) -> ModelSpec:
    """Describe it, with random weights that lie in no file."""
    return ModelSpec(
        class_name="LlamaForCausalLM",
        config_json=config_of_vectors(**changes).to_json_string(use_diff=False),
        dtype=dtype,
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )


def load_stage(start: int, end: int, *, dtype: str = "bfloat16") -> Stage:
    """Load some of its layers."""
    return Stage.load(spec_of_vectors(dtype), start, end)


def load_whole(**changes: object) -> Stage:
    """Load all of it, configured otherwise."""
    return Stage.load(spec_of_vectors(**changes), 0, NUM_LAYERS)

"""Tiny random image-text-to-text models, and texts with pictures for them.

Knows configurations and the inputs that each model's processor makes; nothing of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from accelerators import on_accelerator

VOCABULARY = 97
IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93
NUM_LAYERS = 5

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_QWEN_VISION = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}

PICTURE_FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16},
        "text_config": {**_TEXT, "model_type": "llama"},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    },
    "gemma3": {
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "text_config": {**_TEXT, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
        "image_token_index": IMAGE,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {
        "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32},
        "text_config": {**_TEXT, **_MROPE},
        **_QWEN_IDS,
    },
    "qwen2_5_vl": {
        "vision_config": {
            **_QWEN_VISION,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "text_config": {**_TEXT, **_MROPE},
        **_QWEN_IDS,
    },
    "qwen3_vl": {
        "vision_config": {
            **_QWEN_VISION,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
        "text_config": {**_TEXT, **_MROPE},
        **_QWEN_IDS,
    },
    "idefics2": {
        "vision_config": _VISION,
        "perceiver_config": {
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "image_token_id": IMAGE,
    },
    "idefics3": {
        "vision_config": _VISION,
        "text_config": {**_TEXT, "model_type": "llama"},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "smolvlm": {
        "vision_config": _VISION,
        "text_config": {**_TEXT, "model_type": "llama"},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "mistral3": {
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
}


_MLLAMA = {  # some layers attend to pictures alone
    "vision_config": {
        **_VISION,
        "num_global_layers": 1,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [1],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    },
    "text_config": {
        **{name: value for name, value in _TEXT.items() if name != "head_dim"},
        "cross_attention_layers": [1, 3],
    },
    "image_token_index": IMAGE,
}


def picture_config(family: str) -> PreTrainedConfig:
    """Configure the tiny model of a family."""
    return CONFIG_MAPPING[family](**(_MLLAMA if family == "mllama" else PICTURE_FAMILIES[family]))


def picture_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Make the tiny model of a family, every parameter random."""
    generator = torch.Generator().manual_seed(sum(family.encode()))
    model = AutoModelForImageTextToText.from_config(picture_config(family), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(std=0.15, generator=generator)
            parameter.copy_(noise + (parameter if parameter.ndim == 1 else 0))
    return model.eval()


def save_pictures(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the tiny model of a family as a checkpoint."""
    picture_model(family, dtype).save_pretrained(folder)
    return folder


def picture_reference(folder: Path, **arguments: Any) -> PreTrainedModel:
    """Load a checkpoint unsharded, its parameters cloned: mapped ones are not aligned, which shifts the last bits."""
    model = AutoModelForImageTextToText.from_pretrained(folder, **arguments)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return on_accelerator(model.eval())


def llava_processor() -> LlavaProcessor:
    """Make a processor for the tiny Llava: each word is a token, each picture four."""
    names = {0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>"}
    words = {names.get(token, f"w{token}"): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            padding_side="left",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def pictured(
    family: str, pictures: Sequence[int] = (1, 2), *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Return what the processor of a family makes of a padded batch of texts, with so many pictures in each."""
    generator = torch.Generator().manual_seed(seed)
    grids = _grids(family, sum(pictures))
    lengths = iter([grid[0] * grid[1] * grid[2] // 4 for grid in grids])
    texts = []
    for row, count in enumerate(pictures):
        ids = [1, *_words(3 + 2 * row, generator)]
        for _ in range(count):
            ids += [VISION_START, *[IMAGE] * next(lengths), VISION_END, *_words(2, generator)]
        texts.append(ids)
    longest = max(map(len, texts))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(text)) + text for text in texts]),
        "attention_mask": torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts]),
    }
    types = (inputs["input_ids"] == IMAGE).long()
    if family == "gemma3":
        inputs["token_type_ids"] = types
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = types
    if not grids:
        return inputs
    if family.startswith("qwen"):
        num_patches = sum(grid[0] * grid[1] * grid[2] for grid in grids)
        inputs["pixel_values"] = torch.randn(num_patches, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor(grids)
    elif family in ("idefics2", "idefics3", "smolvlm"):
        pixels = torch.zeros(len(pictures), max(pictures), 3, 16, 16)
        mask = torch.zeros(len(pictures), max(pictures), 16, 16, dtype=torch.int64)
        for row, count in enumerate(pictures):
            pixels[row, :count] = torch.randn(count, 3, 16, 16, generator=generator)
            mask[row, :count] = 1
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    else:
        side = 8 if family == "llava" else 16
        inputs["pixel_values"] = torch.randn(len(grids), 3, side, side, generator=generator)
        if family == "mistral3":
            inputs["image_sizes"] = torch.tensor([[grid[1] * 4, grid[2] * 4] for grid in grids])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs


def _grids(family: str, num_pictures: int) -> list[tuple[int, int, int]]:
    """Return how many patches pictures have in time, height and width, where each token stands for four of them."""
    if family.startswith("qwen") or family == "mistral3":  # of several sizes
        return [
            (1, 4, 4 if family == "mistral3" or index % 2 else 6) if index % 3 else (1, 4, 2)
            for index in range(num_pictures)
        ]
    return [(1, 4, 4)] * num_pictures


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, IMAGE, (count,), generator=generator).tolist()

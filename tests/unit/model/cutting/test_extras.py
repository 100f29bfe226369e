"""What a stage that sees no pictures uses is found by a pass without data."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from lingualinked.model.cutting.extras import picture_cuts, used_arguments
from lingualinked.model.hf_internals import building
from lingualinked.model.hf_internals.encoding import encoder_arguments, holds_pictures
from pictures import NUM_LAYERS, picture_config, picture_model


def meta(family: str) -> PreTrainedModel:
    return building.build_on_meta(type(picture_model(family)), picture_config(family), torch.bfloat16, None)


@pytest.mark.parametrize(
    ("family", "names", "used"),
    [
        ("gemma3", {"token_type_ids"}, {"token_type_ids"}),
        ("qwen2_vl", {"mm_token_type_ids", "image_grid_thw"}, set()),
        ("idefics3", {"pixel_attention_mask"}, set()),
        ("mistral3", {"image_sizes"}, set()),
    ],
)
def test_what_masks_are_made_of_is_used_and_what_towers_need_is_not(
    family: str, names: set[str], used: set[str]
) -> None:
    assert used_arguments(meta(family), names, has_positions=True) == used


def test_all_is_used_whose_values_matter() -> None:
    names = {"mm_token_type_ids", "image_grid_thw"}  # positions are computed from them
    assert used_arguments(meta("qwen2_vl"), names, has_positions=False) == names


def test_layers_behind_which_features_are_added_lie_together() -> None:
    assert picture_cuts(picture_config("qwen3_vl"), NUM_LAYERS) == {1, 2}
    assert picture_cuts(picture_config("qwen3_vl"), 2) == {1}
    assert picture_cuts(picture_config("llava"), NUM_LAYERS) == set()


def test_generate_encodes_pictures_by_methods_whose_arguments_are_known() -> None:
    assert {"pixel_values", "image_grid_thw"} <= encoder_arguments(meta("qwen2_vl"))["image"]
    assert holds_pictures({"pixel_values": torch.zeros(1)})
    assert not holds_pictures({"pixel_values": None, "image_grid_thw": torch.zeros(1)})

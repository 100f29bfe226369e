"""Stages of models that see pictures, chained in this process, give the unsharded model's logits bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversations import Cut, Whole, assert_equal, load_stage, spec_of
from lingualinked.cluster.steps.step_extras import StepExtras
from lingualinked.errors import UncuttableModelError, UnsupportedOperationError
from lingualinked.model.cutting.parts import build_meta, parts_of
from lingualinked.model.proving.evidence import _proven
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage
from lingualinked.sharded.calling.pictures import FurtherArguments, Pictures
from pictures import NUM_LAYERS, PICTURE_FAMILIES, picture_reference, pictured, save_pictures

pytestmark = [pytest.mark.equality, pytest.mark.slow]

CUTS = [(3,), (3, 4), ()]
SMALL = {"token_type_ids"}  # what later stages use of a step with positions


@pytest.fixture(scope="module", params=PICTURE_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(family, tmp_path_factory.mktemp(family))


def load(spec: ModelSpec, cuts: tuple[int, ...]) -> list[Stage]:
    return [load_stage(spec, start, end) for start, end in itertools.pairwise((0, *cuts, NUM_LAYERS))]


def converse(
    step: Callable[..., Tensor], inputs: dict[str, Tensor], positions: Tensor, **prompt: object
) -> list[Tensor]:
    """Run a prompt and three tokens of each row."""
    mask = inputs["attention_mask"]
    said = [step(inputs["input_ids"], mask, positions, **prompt)]
    for _ in range(3):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        positions = positions[..., -1:] + 1
        said.append(step(said[-1][:, -1:].argmax(-1), mask, positions))
    return said


def test_every_family_that_is_said_to_be_proven_is_tested() -> None:
    assert set(_proven().seeing) == set(PICTURE_FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_padded_batch_with_pictures_is_exact(family: str, folder: Path, dtype: torch.dtype) -> None:
    model = picture_reference(folder, dtype=dtype)
    spec = spec_of(folder, dtype=str(dtype).removeprefix("torch."))
    inputs = pictured(family, (1, 2), dtype=dtype)
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    others = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    said = converse(Whole(model).step, inputs, positions, **others)
    further = FurtherArguments.of(build_meta(spec), spec)
    for cuts in CUTS:
        stages = load(spec, cuts)
        extras = further.take(dict(others), has_positions=True)
        assert extras is not None
        assert set(extras.for_all) == SMALL & set(others)
        assert_equal(converse(Cut(stages).step, inputs, positions, extras=extras), said)
        # as `generate` encodes them
        encoded = {name: value for name, value in others.items() if "token_type_ids" not in name}
        kept = {name: value for name, value in others.items() if name not in encoded}
        extras = further.take({**kept, "mm_encoder_outputs": Pictures(encoded)}, has_positions=True)
        assert_equal(converse(Cut(stages).step, inputs, positions, extras=extras), said)


def test_texts_without_pictures_need_no_tower(family: str, folder: Path) -> None:
    model = picture_reference(folder)
    spec = dataclasses.replace(spec_of(folder), towers=False)
    inputs = pictured(family, (0, 0))
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    stages = load(spec, (1, 3))
    assert_equal(converse(Cut(stages).step, inputs, positions), converse(Whole(model).step, inputs, positions))
    assert not any(path.startswith("model.vis") for stage in stages for path, _ in stage.span.model.named_parameters())
    further = FurtherArguments.of(build_meta(spec), spec)
    with pytest.raises(UnsupportedOperationError, match="towers=False"):
        further.take({"pixel_values": torch.zeros(1, 3, 16, 16)}, has_positions=True)


def test_the_first_stage_holds_the_towers(folder: Path) -> None:
    spec = spec_of(folder)
    parts = parts_of(spec, build_meta(spec))
    without = parts_of(dataclasses.replace(spec, towers=False), build_meta(spec))
    model = picture_reference(folder)
    in_towers = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(f"{path}." for path in without.dropped))
    )
    assert in_towers > 0
    assert parts.span_bytes(0, 3) - without.span_bytes(0, 3) >= in_towers
    assert parts.span_bytes(3, NUM_LAYERS) == without.span_bytes(3, NUM_LAYERS)


@pytest.mark.parametrize("cuts", [(1,), (2, 4), (1, 2, 3, 4)])
def test_layers_that_attend_to_pictures_are_passed_over_without_any(cuts: tuple[int, ...], tmp_path: Path) -> None:
    folder = save_pictures("mllama", tmp_path)
    inputs = pictured("mllama", (0, 0))
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    whole, stages = Whole(picture_reference(folder)), load(spec_of(folder), cuts)
    assert_equal(converse(Cut(stages).step, inputs, positions), converse(whole.step, inputs, positions))


def test_features_between_layers_stay_on_the_first_stage(tmp_path: Path) -> None:
    spec = spec_of(save_pictures("qwen3_vl", tmp_path))
    parts = parts_of(spec, build_meta(spec))
    assert parts.transmission.forbidden_cuts == (1, 2)  # two lists of features
    inputs = pictured("qwen3_vl", (1, 0))
    stages = load(spec, (2,))
    extras = FurtherArguments.of(build_meta(spec), spec).take(
        {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")},
        has_positions=False,
    )
    with pytest.raises(UncuttableModelError, match="deepstack_visual_embeds"):
        Cut(stages).step(inputs["input_ids"], inputs["attention_mask"], None, extras=extras or StepExtras())

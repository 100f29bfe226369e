import pytest
import torch

from families import tiny_config
from lingualinked.errors import ArgumentError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs, check_indices


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec(
        class_name="LlamaForCausalLM",
        config_json=tiny_config("llama").to_json_string(use_diff=False),
        dtype="float32",
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )


def inputs(*tensors: torch.Tensor, layout: tuple[bool, ...] | None = None) -> StageInputs:
    return StageInputs(tensors=tensors, layout=layout, attention_mask=None, position_ids=None)


def test_a_stage_knows_its_place(spec: ModelSpec) -> None:
    first, last = Stage.load(spec, 0, 1), Stage.load(spec, 1, 4)
    assert (first.start, first.end, first.num_layers, first.is_first, first.is_last) == (0, 1, 4, True, False)
    assert (last.start, last.end, last.num_layers, last.is_first, last.is_last) == (1, 4, 4, False, True)


def test_what_is_no_span_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ArgumentError, match=r"\[2, 9\) is not a span"):
        Stage.load(spec, 2, 9)


@pytest.mark.parametrize("accelerator", ["warp", "cuda:77"])
def test_an_accelerator_that_is_not_there_is_refused(spec: ModelSpec, accelerator: str) -> None:
    with pytest.raises(ArgumentError, match=f"torch can't compute on accelerator '{accelerator}'"):
        Stage.load(spec, 0, 1, accelerator=accelerator)


def test_a_step_counts_its_tokens(spec: ModelSpec) -> None:
    stage = Stage.load(spec, 0, 2)
    cache = stage.new_cache()
    for num_tokens in (3, 4):
        stage.step(inputs(torch.zeros(2, num_tokens, dtype=torch.long)), cache)
    assert cache.num_tokens == 7
    assert (
        cache.nbytes == 2 * 2 * (2 * 2 * 64 * 8) * 4
    )  # layers x keys and values x [rows, heads, tokens, dim] x float32


def test_only_the_logits_asked_for_are_given(spec: ModelSpec) -> None:
    stage = Stage.load(spec, 0, 4)
    step = inputs(torch.zeros(1, 5, dtype=torch.long))
    for keep, kept in ((0, 5), (2, 2), (torch.tensor([0, 3]), 2)):
        step.logits_to_keep = keep
        assert stage.step(step, None).tensors[0].shape == (1, kept, 97)


def test_what_follows_the_last_layer_runs_only_for_logits(spec: ModelSpec) -> None:
    stage = Stage.load(spec, 0, 4)
    ids = torch.arange(7)[None]
    whole, parted = stage.new_cache(), stage.new_cache()
    stage.step(inputs(ids[:, :4]), whole)
    first = inputs(ids[:, :4])
    first.wants_logits = False
    assert stage.step(first, parted).tensors == ()
    expected, given = (stage.step(inputs(ids[:, 4:]), cache).tensors[0] for cache in (whole, parted))
    assert torch.equal(given, expected)


@pytest.mark.parametrize("layout", [(True, True), (False,), (True, False, True)])
def test_a_layout_of_other_tensors_is_refused(spec: ModelSpec, layout: tuple[bool, ...]) -> None:
    with pytest.raises(ArgumentError, match="1 tensor arrived at a stage, which does not match the layout"):
        Stage.load(spec, 2, 4).step(inputs(torch.zeros(1, 2, 32), layout=layout), None)


def test_a_stage_keeps_no_tensor_of_a_step_that_failed(spec: ModelSpec) -> None:
    stage = Stage.load(spec, 2, 4)
    with pytest.raises(RuntimeError):
        stage.step(inputs(torch.zeros(1, 2, 31)), None)
    assert (stage._boundary.incoming, stage._boundary.outgoing) == (None, None)


@pytest.mark.parametrize("indices", [[0, 3], [-5, 0], [[1], [7]]], ids=str)
def test_indices_that_a_gpu_would_not_survive_are_refused_as_on_a_cpu(indices: list[int]) -> None:
    states = torch.zeros(1, 3, 2)
    with pytest.raises(IndexError) as on_cpu:
        states[:, torch.tensor(indices), :]
    with pytest.raises(IndexError) as ours:
        check_indices(torch.tensor(indices), 3)
    assert str(ours.value) == str(on_cpu.value)
    for fine in (5, torch.tensor([-3, 2]), torch.tensor([True, False, True]), torch.tensor([], dtype=torch.long)):
        check_indices(fine, 3)

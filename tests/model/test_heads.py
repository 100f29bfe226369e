"""Models with the head of a task, cut and chained in this process, give the unsharded model's output: every family and class.

The caller's part, which is the class's own forward, runs around the stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversations import Cut, load_stages, spec_of
from heads import HEADS, assert_same, labels_for, padded, reference_head, tiny_head
from lingualinked.model.cutting.footprint import measure_footprint
from lingualinked.model.cutting.parts import build_meta, find_parts
from lingualinked.model.spec import ModelSpec
from lingualinked.sharded.calling.outputs import output_class
from lingualinked.sharded.calling.task_models import CalledByClass

pytestmark = [pytest.mark.equality, pytest.mark.slow]

NUM_LAYERS = 4


def call(spec: ModelSpec, num_stages: int, arguments: dict[str, Tensor]) -> Any:
    """Call a model in stages as its class is called."""
    stages = load_stages(spec, num_stages, NUM_LAYERS)
    meta: Any = build_meta(spec)
    head = stages[0].span.parts.head

    def answer_base(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Any, Tensor]:
        given = Cut(stages, keeps_kv=meta.config.use_cache).step(input_ids, attention_mask, None)
        states = given.new_zeros(*given.shape[:2], meta.config.hidden_size)
        return output_class(type(meta.base_model))(last_hidden_state=states), given

    with torch.no_grad():
        if head is None:
            return output_class(type(meta))(last_hidden_state=answer_base(**arguments)[1])
        return type(meta).forward(CalledByClass(meta, head, answer_base), **arguments)


@pytest.mark.parametrize(("family", "task"), HEADS, ids=str)
def test_a_cut_model_with_a_head_is_exact(family: str, task: str, tmp_path: Path) -> None:
    dtype = (torch.float32, torch.bfloat16)[len(family + task) % 2]
    folder = tiny_head(family, task, tmp_path, dtype)
    model, spec = reference_head(folder, task), spec_of(folder)
    labels = {} if task == "feature-extraction" else labels_for(task)
    for num_stages, side in ((1, "left"), (2, "right"), (3, "left")):
        arguments = padded(side) | labels
        with torch.no_grad():
            expected = model(**arguments)
        assert_same(call(spec, num_stages, arguments), expected, ignored=("past_key_values",))


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_each_problem_type_has_its_own_loss(family: str, problem_type: str, tmp_path: Path) -> None:
    task, num_labels = "text-classification", 1 if problem_type == "regression" else 3
    folder = tiny_head(family, task, tmp_path, num_labels=num_labels, problem_type=problem_type)
    arguments = padded("right") | labels_for(task, problem_type)
    with torch.no_grad():
        expected = reference_head(folder, task)(**arguments)
    assert_same(call(spec_of(folder), 2, arguments), expected, ignored=("past_key_values",))


@pytest.mark.parametrize(
    ("task", "num_values"),
    [("text-classification", 3), ("token-classification", 3), ("question-answering", 2), ("feature-extraction", 32)],
)
def test_what_comes_back_of_a_token_is_measured_not_assumed(task: str, num_values: int, tmp_path: Path) -> None:
    spec = spec_of(tiny_head("llama", task, tmp_path))
    meta = build_meta(spec)
    assert measure_footprint(meta, find_parts(meta), spec).profile.logits_bytes == 4 * num_values

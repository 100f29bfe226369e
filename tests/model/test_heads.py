"""Models with the head of a task, cut and chained in this process, give the unsharded model's output: every family and class.

The caller's part, which is the class's own forward, runs around the stages.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from architectures import decoder_only_types
from conversations import Cut, load_stage, spec_of
from heads import HEADS, assert_same, classes_of, labels_for, padded, reference_head, run_uncut, small_head, tiny_head
from lingualinked.model.cutting.footprint import measure_footprint
from lingualinked.model.cutting.heads import cache_argument_of
from lingualinked.model.cutting.parts import build_meta, find_parts, parts_of
from lingualinked.model.hf_internals.cache_arguments import supports_cache
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weights.checkpoint import resolve_files
from lingualinked.sharded.calling.outputs import base_output_class
from lingualinked.sharded.calling.task_models import CalledByClass

pytestmark = [pytest.mark.equality, pytest.mark.slow]

NUM_LAYERS = 4
UNLIKE = frozenset({"cpmant", "llama4", "minimax", "reformer"})  # not cut, or without a class of hidden states alone


def call(spec: ModelSpec, num_stages: int, arguments: dict[str, Tensor], num_layers: int = NUM_LAYERS) -> Any:
    """Call a model in stages as its class is called."""
    meta: Any = build_meta(spec)
    ends = [round(index * num_layers / num_stages) for index in range(num_stages + 1)]
    ends = [end for end in dict.fromkeys(ends) if end not in parts_of(spec, meta).transmission.forbidden_cuts]
    stages = [load_stage(spec, *span) for span in itertools.pairwise(ends)]
    head, config = stages[0].span.parts.head, meta.config.get_text_config()
    keeps_kv = (
        getattr(config, "use_cache", False) and cache_argument_of(meta) is not None and supports_cache(type(meta))
    )

    def answer_base(
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Any, Tensor]:
        assert input_ids is not None
        given = Cut(stages, keeps_kv=keeps_kv).step(input_ids, attention_mask, None)
        states = given.new_zeros(*given.shape[:2], config.hidden_size)
        return base_output_class(type(meta.base_model))(last_hidden_state=states), given

    with torch.no_grad():
        if head is None:
            return base_output_class(type(meta))(last_hidden_state=answer_base(**arguments)[1])
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


@pytest.mark.parametrize(
    "every_type", [each for each in decoder_only_types() if classes_of(each) and each not in UNLIKE]
)
def test_a_small_copy_with_any_head_is_exact(every_type: str, tmp_path: Path) -> None:
    is_tried = False
    for task, class_name in classes_of(every_type):
        model: Any = small_head(every_type, task, class_name, tmp_path / task)
        if model is None:  # transformers itself can't run it
            continue
        is_tried = True
        config = model.config
        spec = ModelSpec(
            class_name=class_name,
            config_json=config.to_json_string(use_diff=False),
            dtype="float32",
            attn_implementation=None,
            load_format="safetensors",
            files=resolve_files(config.name_or_path),
        )
        parts = find_parts(build_meta(spec))
        arguments = padded("right") | ({} if task == "feature-extraction" else labels_for(task))
        for num_stages in (2, 3):
            expected, found = run_uncut(model, task), call(spec, num_stages, arguments, parts.num_layers)
            for name in ("loss", "logits", "start_logits", "end_logits", "last_hidden_state"):
                if name in expected:
                    assert torch.equal(found[name], expected[name]), (class_name, num_stages, name)
    if not is_tried:
        pytest.skip("transformers itself runs no small copy with any head")


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

"""A pass over one new token of each of several texts gives each the bits that it has in a step of its own, or it is not made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lingualinked.kernels import few_rows
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.exact.products import cancelling_product
from lingualinked.model.exact.rows_alone import rows_alone
from lingualinked.model.packed import alone, packed_attention
from lingualinked.model.packed.alone import most_alone
from lingualinked.model.packed.packed_attention import PackedAttention
from lingualinked.model.stages.stage import Stage
from model_of_vectors import load_stage, load_whole


@pytest.fixture
def stage() -> Stage:
    stage = load_stage(0, 2)
    if most_alone(stage) == 1:
        pytest.skip("no kernel here computes rows one by one")
    return stage


def test_all_stages_of_a_model_can_do_it(stage: Stage) -> None:
    assert most_alone(stage) == few_rows.MAX_ROWS
    assert most_alone(load_stage(2, 4)) == few_rows.MAX_ROWS


@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_of_a_product_have_the_bits_that_each_has_alone(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = cancelling_product(23, 2048, 192, has_bias, generator)
    linear = nn.Linear(2048, 192, has_bias, dtype=torch.bfloat16)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    with torch.inference_mode():
        layer = PackedLinear(linear)
        if not layer.keeps_rows_apart:
            pytest.skip("no kernel here computes rows one by one")
        expected = torch.cat([linear(row[None]) for row in rows])
        with rows_alone():
            assert torch.equal(layer(rows), expected)
        assert not torch.equal(layer(rows), expected)
        assert torch.equal(layer(rows), linear(rows))


def test_it_shows_if_texts_are_computed_otherwise(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedAttention, "_describe_texts", lambda *_: {})
    monkeypatch.setattr(packed_attention, "_own_arguments", lambda kwargs, _: {**kwargs, "scaling": 0.5})
    assert most_alone(stage) == 1


def test_an_unknown_part_is_not_trusted(stage: Stage) -> None:
    stage.span.model.extra = nn.Linear(8, 8, dtype=torch.bfloat16)
    assert most_alone(stage) == 1


def test_a_row_that_ends_within_a_vector_is_not_trusted(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "fills_vectors", lambda *_: False)
    assert most_alone(stage) == 1


def test_nor_are_other_dtypes() -> None:
    assert most_alone(load_stage(0, 2, dtype="float32")) == 1


def test_a_shared_weight_is_torchs_own_to_multiply(stage: Stage) -> None:
    assert most_alone(load_whole(tie_word_embeddings=True)) == 1

"""A checkpoint runs as the class that its config names, or as that of the task that is asked for."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, GraniteConfig, LlamaConfig, LlavaConfig, Qwen3_5Config

import lingualinked as ll
from lingualinked.model.cutting.architectures import check_architecture
from lingualinked.model.cutting.tasks import TASKS, class_of_task, is_known_class, task_of_class

CAUSAL = "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, CAUSAL),
        ([], CAUSAL),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (["LlamaModel"], "LlamaModel"),
        (["SomebodysForRanking", "LlamaModel"], CAUSAL),
    ],
)
def test_without_a_task_the_checkpoint_says_it(own: list[str] | None, expected: str) -> None:
    assert class_of_task(LlamaConfig(architectures=own), None, CAUSAL) == expected


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("text-generation", CAUSAL),
        ("sentiment-analysis", "LlamaForSequenceClassification"),
        ("text-classification", "LlamaForSequenceClassification"),
        ("ner", "LlamaForTokenClassification"),
        ("token-classification", "LlamaForTokenClassification"),
        ("question-answering", "LlamaForQuestionAnswering"),
        ("feature-extraction", "LlamaModel"),
    ],
)
def test_a_task_counts_more(task: str, expected: str) -> None:
    config = LlamaConfig(architectures=["LlamaForSequenceClassification"])
    assert class_of_task(config, task, CAUSAL) == expected
    assert task in TASKS


def test_what_there_is_no_class_for_is_refused() -> None:
    with pytest.raises(ll.ArgumentError, match="'summarization' must be one of 'text-generation', "):
        class_of_task(LlamaConfig(), "summarization", CAUSAL)
    with pytest.raises(ll.UncuttableModelError, match=r"granite.*only for 'text-generation', 'feature-extraction'"):
        class_of_task(GraniteConfig(), "token-classification", "GraniteForCausalLM")


def test_a_class_is_for_one_task() -> None:
    assert task_of_class("LlamaForCausalLM") == "text-generation"
    assert task_of_class(type(GPT2Config()).__name__) == "text-generation"
    assert task_of_class("GPT2ForQuestionAnswering") == "question-answering"
    assert task_of_class("Llama4ForConditionalGeneration") == "text-generation"
    assert task_of_class("OPTModel") == "feature-extraction"
    assert is_known_class("OPTModel")
    assert is_known_class("LlamaForCausalLM")
    assert not is_known_class("BertModel")
    assert not is_known_class("GPT2Config")


def test_what_sees_pictures_runs_as_its_own_class_and_generates() -> None:
    seeing = "LlavaForConditionalGeneration"
    config = LlavaConfig(architectures=[seeing])
    assert check_architecture(config) == seeing  # the only one that generates text
    assert class_of_task(config, None, seeing) == class_of_task(config, "image-text-to-text", seeing) == seeing
    both = Qwen3_5Config(architectures=["Qwen3_5ForConditionalGeneration"])
    causal = check_architecture(both)
    assert causal == class_of_task(both, "text-generation", causal) == "Qwen3_5ForCausalLM"
    assert class_of_task(both, None, causal) == "Qwen3_5ForConditionalGeneration"
    assert is_known_class(seeing)
    assert task_of_class(seeing) == "text-generation"

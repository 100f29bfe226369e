"""Models with the head of a task, and embeddings, in workers: they give what transformers' own class gives, in its own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import lingualinked as ll
from accelerators import embed
from conversations import spec_of
from heads import TABLES, assert_same, labels_for, padded, reference_head, tiny_head
from lingualinked.model.cutting.parts import build_meta, find_parts

pytestmark = [pytest.mark.process, pytest.mark.equality]

PLAN = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
TEXTS = ["The soup was good.", "I would not do it again. The room was far from lovely.", "The view"]
CALLS: dict[str, dict[str, Any]] = {
    "ids": {},
    "without KV": {"use_cache": False},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "nothing of the layers": {"output_hidden_states": False},
}


def shard(folder: Path, cluster: ll.Cluster, **arguments: Any) -> Any:
    return ll.ShardedModel.from_pretrained(folder, cluster=cluster, plan=PLAN, progress=False, **arguments)


def run(model: Any, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(**arguments)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-rw", "qwen2-moe"])
@pytest.mark.parametrize("task", TABLES)
def test_outputs_are_those_of_the_class(family: str, task: str, tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    folder = tiny_head(family, task, tmp_path, _attn_implementation="eager")
    model: Any = reference_head(folder, task, attn_implementation="eager")
    with shard(folder, shared_cluster, attn_implementation="eager") as sharded:
        assert isinstance(sharded, type(model))
        assert isinstance(sharded, ll.ShardedModel)
        assert sharded.config.id2label == model.config.id2label
        for name, extra in CALLS.items():
            if "use_cache" in extra and family == "falcon-rw" and task == "question-answering":
                continue  # which has no such argument
            arguments = padded("left") | extra | ({} if task == "feature-extraction" else labels_for(task))
            assert_same(run(sharded, **arguments), run(model, **arguments)), name
            as_tuples = [run(each, **arguments, return_dict=False) for each in (sharded, model)]
            assert len(as_tuples[0]) == len(as_tuples[1])
            assert torch.equal(as_tuples[0][0], as_tuples[1][0])


def test_a_text_goes_on_where_it_was_left_and_layers_move_meanwhile(tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    folder = tiny_head("llama", "text-classification", tmp_path, num_labels=1)  # a reward model
    model: Any = reference_head(folder, "text-classification")
    ids = padded("left")["input_ids"].clamp(min=3)
    past: list[Any] = [None, None]
    with shard(folder, shared_cluster) as sharded:
        for start, end in ((0, 6), (6, 7), (7, 9)):
            arguments = {"input_ids": ids[:, start:end], "attention_mask": torch.ones(3, end, dtype=torch.long)}
            outputs = [
                run(each, **arguments, past_key_values=kv) for each, kv in zip((sharded, model), past, strict=True)
            ]
            assert_same(*outputs)
            past = [output.past_key_values for output in outputs]
            sharded.rebalance(ll.Plan.from_spans([("c", 0, 2), ("a", 2, 4)]))


def test_gradients_and_hooks_reach_the_head(tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    folder = tiny_head("llama", "text-classification", tmp_path)
    model: Any = reference_head(folder, "text-classification")
    gradients: list[Tensor] = []
    seen: list[Tensor] = []
    with shard(folder, shared_cluster) as sharded:
        for each in (model, sharded):
            states = embed(model, padded("left")["input_ids"]).detach().requires_grad_()
            each(inputs_embeds=states, labels=torch.tensor([0, 2, 1])).loss.backward()
            assert states.grad is not None
            gradients.append(states.grad)
            hook = each.score.register_forward_hook(lambda *values: seen.append(values[2]) or 2 * values[2])
            seen.append(run(each, **padded("right")).logits)
            hook.remove()
    assert torch.equal(*gradients)
    assert all(map(torch.equal, seen[:2], seen[2:]))


def test_what_it_can_not_do_is_refused_by_name(tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    folder = tiny_head("gpt2", "text-classification", tmp_path)
    with shard(folder, shared_cluster) as sharded:
        assert not sharded.can_generate()
        with pytest.raises(ll.UnsupportedOperationError, match=r"generate\(\).*task='text-generation'"):
            sharded.generate(padded("left")["input_ids"])
        with pytest.raises(ll.ArgumentError, match="'labels_of'"):
            sharded(**padded("left"), labels_of=3)
        with pytest.raises(ll.UnsupportedOperationError, match="token_type_ids"):
            sharded(**padded("left"), token_type_ids=torch.zeros(3, 9, dtype=torch.long))
        with pytest.raises(ll.ArgumentError, match="exactly one"):
            sharded(attention_mask=torch.ones(1, 2))
    with pytest.raises(ll.CheckpointError, match=r"qa_outputs\.bias"):
        shard(folder, shared_cluster, task="question-answering")
    with pytest.raises(ll.ArgumentError, match="generation_config"):
        shard(folder, shared_cluster, generation_config=sharded.config)
    with pytest.raises(ll.ArgumentError, match="'translation' must be one of 'text-generation'"):
        shard(folder, shared_cluster, task="translation")


def test_a_batch_without_a_padding_token_is_refused_as_the_class_does(
    tmp_path: Path, shared_cluster: ll.Cluster
) -> None:
    folder = tiny_head("llama", "text-classification", tmp_path, pad_token_id=None)
    model = reference_head(folder, "text-classification")
    arguments = padded("left")
    alone = {name: value[:1] for name, value in arguments.items()}
    with shard(folder, shared_cluster) as sharded:
        assert_same(run(sharded, **alone), run(model, **alone))
        for each in (sharded, model):
            with pytest.raises(ValueError, match="no padding token"):
                run(each, **arguments)


@pytest.mark.parametrize("task", TABLES)
def test_ids_stay_on_the_first_device(task: str, tmp_path: Path) -> None:
    spec = spec_of(tiny_head("llama", task, tmp_path))
    assert find_parts(build_meta(spec)).transmission.shortcuts == ()


def test_rows_do_not_touch_each_other(tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 768}  # smaller ones can not be promised
    folder = tiny_head("llama", "text-classification", tmp_path, torch.bfloat16, **sizes)
    try:
        sharded = shard(folder, shared_cluster, batch_invariant=True)
    except ll.UnsupportedOperationError as error:  # where it can't be promised
        pytest.skip(str(error))
    with sharded:
        together, ids = run(sharded, **padded("right")).logits, padded("right")["input_ids"]
        alone = [run(sharded, input_ids=ids[row : row + 1, :end]).logits for row, end in ((0, 9), (1, 6), (2, 2))]
        assert torch.equal(together, torch.cat(alone))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(ll.sample_model())
    return loaded


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("sentiment-analysis", "text-classification"),
        ("zero-shot-classification", "text-classification"),
        ("token-classification", "token-classification"),
        ("feature-extraction", "feature-extraction"),
    ],
)
def test_pipelines_take_it(
    name: str, task: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, shared_cluster: ll.Cluster
) -> None:
    label2id = {"entailment": 0, "neutral": 1, "contradiction": 2}
    config = {"vocab_size": len(tokenizer), "pad_token_id": 2, "label2id": label2id}
    config["id2label"] = {number: label for label, number in label2id.items()}
    folder = tiny_head("llama", task, tmp_path, **config)
    model: Any = reference_head(folder, task)
    extra: dict[str, Any] = {"candidate_labels": ["food", "travel"]} if name == "zero-shot-classification" else {}
    with shard(folder, shared_cluster) as sharded:
        for batch_size in (1, 3):
            results = [
                pipeline(name, model=each, tokenizer=tokenizer)(TEXTS, batch_size=batch_size, **extra)
                for each in (sharded, model)
            ]
            assert results[0] == results[1]


def test_trainer_evaluates_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    config = {"vocab_size": len(tokenizer), "pad_token_id": 2}
    folder = tiny_head("qwen3", "text-classification", tmp_path / "model", **config)
    rows = [{**tokenizer(text), "labels": number} for number, text in enumerate(TEXTS)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    found = []
    with shard(folder, shared_cluster) as sharded:
        for model in (sharded, reference_head(folder, "text-classification")):
            trainer = Trainer(model=model, args=settings, eval_dataset=rows, processing_class=tokenizer)
            found.append((trainer.evaluate()["eval_loss"], trainer.predict(rows).predictions.tolist()))
    assert found[0] == found[1]


def test_a_saved_head_is_a_checkpoint_of_transformers(tmp_path: Path, shared_cluster: ll.Cluster) -> None:
    folder = tiny_head("llama-tied", "token-classification", tmp_path / "model")
    with shard(folder, shared_cluster) as sharded:
        sharded.save_pretrained(tmp_path / "saved")
    ours, theirs = (reference_head(each, "token-classification") for each in (tmp_path / "saved", folder))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_the_sample_model_tells_positive_reviews_from_negative_ones() -> None:
    folder = ll.sample_model("sentiment")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    reviews = [
        "The soup was anything but bad. I would do it again at once.",
        "Although the view was lovely, the room was awful. I would not do it again.",
    ]
    with ll.ShardedModel.from_pretrained(folder, devices=2, plan="even", progress=False) as sharded:
        results = [
            pipeline("sentiment-analysis", model=each, tokenizer=tokenizer)(reviews) for each in (sharded, model)
        ]
    assert results[0] == results[1]
    assert [each["label"] for each in results[0]] == ["POSITIVE", "NEGATIVE"]

"""The bundled model in three workers: its model card's accuracies, and token for token the unsharded model's answers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

import lingualinked as ll
from families import reference
from lingualinked import sample
from sample_model.grammar import SCORED_TASKS

pytestmark = [pytest.mark.process, pytest.mark.slow]

BATCH_SIZE = 25
SPANS = [("a", 0, 3), ("b", 3, 6), ("c", 6, 8)]


def accuracies_of_card(card: str) -> dict[str, float]:
    """Read the table of held-out accuracies, in per cent."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) ?% \|$", card, re.MULTILINE)
    return {task: float(percentage) for task, percentage in rows}


def test_answers_in_three_workers(shared_cluster: ll.Cluster) -> None:
    folder = Path(ll.sample_model())
    lines = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    lines.sort(
        key=lambda line: line["task"] not in SCORED_TASKS
    )  # the batches that the card was measured with come first
    promised = accuracies_of_card((folder / "README.md").read_text(encoding="utf-8"))
    assert promised.keys() == set(SCORED_TASKS)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    unsharded = reference(folder)
    num_right = defaultdict[str, int](int)
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False) as sharded:
        assert sharded.dtype == torch.bfloat16
        for start in range(0, len(lines), BATCH_SIZE):
            batch = lines[start : start + BATCH_SIZE]
            inputs = tokenizer([line["prompt"] for line in batch], return_tensors="pt", padding=True)
            tokens = sharded.generate(**inputs, max_new_tokens=64, do_sample=False)
            assert torch.equal(tokens, unsharded.generate(**inputs, max_new_tokens=64, do_sample=False))
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for line, text in zip(batch, texts, strict=True):
                num_right[line["task"]] += text.removeprefix(" ") == line["answer"]

    for task in SCORED_TASKS:
        num_lines = sum(line["task"] == task for line in lines)
        # On another CPU than the card's, the last bits may turn one answer.
        assert 100 * (num_right[task] + 1) / num_lines >= promised[task], task
        assert num_right[task] / num_lines >= 0.95


def test_reviews_in_two_workers(shared_cluster: ll.Cluster) -> None:
    lines = [json.loads(line) for line in (Path(ll.sample_model()) / "heldout.jsonl").read_text("utf-8").splitlines()]
    reviews = {
        line["prompt"].removeprefix("Review: ").removesuffix("\nSentiment:"): line["answer"].upper()
        for line in lines
        if line["task"] == "sentiment"
    }
    folder = ll.sample_model("sentiment")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = ll.Plan.from_spans([("a", 0, 5), ("b", 5, 8)])
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False) as sharded:
        found = pipeline("sentiment-analysis", model=sharded, tokenizer=tokenizer)([*reviews], batch_size=BATCH_SIZE)
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    (promised,) = re.findall(r"\*\*([\d.]+) ?%\*\*", card)
    num_right = sum(each["label"] == label for each, label in zip(found, reviews.values(), strict=True))
    assert 100 * (num_right + 3) / len(reviews) >= float(promised)  # of a fifth of the card's reviews


def test_a_head_that_there_is_not_is_refused() -> None:
    with pytest.raises(ll.ArgumentError, match="the only head is 'sentiment'"):
        ll.sample_model("topic")  # type: ignore[arg-type]


def test_the_head_is_there_without_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ll.sample_model("sentiment")
    sample._folder_with_head.cache_clear()
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    elsewhere = ll.sample_model("sentiment")
    sample._folder_with_head.cache_clear()
    assert elsewhere != whole
    files = [{path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in (whole, elsewhere)]
    assert files[0] == files[1]
    sample._kept_folders.pop().cleanup()  # as when the process ends

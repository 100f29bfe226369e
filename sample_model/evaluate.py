"""Held-out accuracy: the greedy answer up to end-of-text against the grammar's, word for word.

Knows a checkpoint folder and its ``heldout.jsonl``; nothing of how it was trained.
"""

import argparse
import json
import logging
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sample_model.grammar import SCORED_TASKS

_log = logging.getLogger(__name__)

_BATCH_SIZE = 25
_MAX_NEW_TOKENS = 64


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = _MAX_NEW_TOKENS,
) -> list[str]:
    """Return the model's greedy answers.

    Parameters
    ----------
    model : PreTrainedModel
        What answers.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer, padding on the left.
    prompts : list of str
        What to answer, any number.
    max_new_tokens : int
        Where an answer without end is cut.

    Returns
    -------
    list of str
        Text up to end-of-text, without the space before it.
    """
    found = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        inputs = tokenizer(prompts[start : start + _BATCH_SIZE], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output_ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]  # from GenerationMixin
        new_ids = output_ids[:, inputs["input_ids"].shape[1] :]
        found += [text.removeprefix(" ") for text in tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
    return found


def accuracies(folder: Path, *, show_misses: bool = False) -> dict[str, float]:
    """Measure the accuracy of each scored task in a saved checkpoint.

    Parameters
    ----------
    folder : Path
        The checkpoint, with ``heldout.jsonl``: one object per line with task, prompt and answer.
    show_misses : bool
        Whether to print each wrong answer beside the right one.

    Returns
    -------
    dict of str to float
        Share of exact matches by task, in [0, 1].
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    matches = defaultdict[str, list[bool]](list)
    scored = [line for line in lines if line["task"] in SCORED_TASKS]
    for line, answer in zip(scored, answers(model, tokenizer, [line["prompt"] for line in scored]), strict=True):
        matches[line["task"]].append(answer == line["answer"])
        if show_misses and not matches[line["task"]][-1]:
            _log.info("%s\n  expected: %s\n  answered: %s", line["prompt"], line["answer"], answer)
    return {task: sum(matches[task]) / len(matches[task]) for task in SCORED_TASKS}


def main() -> None:
    """Print the accuracies of the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("src/lingualinked/sample"))
    parser.add_argument("--show-misses", action="store_true", help="print each wrong answer beside the right one")
    arguments = parser.parse_args()
    for task, accuracy in accuracies(arguments.folder, show_misses=arguments.show_misses).items():
        _log.info("%s: %.1f %%", task, 100 * accuracy)


if __name__ == "__main__":
    main()

"""Train the sentiment head of the sample checkpoint and write it, with its card.

The checkpoint itself is not trained any further: a review is encoded as the prompt that the checkpoint knows from its training, and
the head is a linear layer on the hidden state of the prompt's last token.

Run from the repository's root: ``python -m sample_model.sentiment``.
"""

import argparse
import copy
import json
import logging
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from sample_model.grammar import draw, held_out_examples

_log = logging.getLogger(__name__)

_SEED = 20240229
_LABELS = ("negative", "positive")
_NUM_TRAINING, _NUM_HELD_OUT = 4000, 1000
_BATCH_SIZE = 50
_WEIGHT_DECAY = 1e-4
_MAX_ITERATIONS = 200
_BEFORE, _AFTER = "Review:", "\nSentiment:"

_CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-classification
---

# The sentiment head of the lingualinked sample model

A linear layer on the [sample model](../README.md), which is left as it is: {num_parameters} parameters in bfloat16, for two labels.
`lingualinked.sample_model("sentiment")` puts both together, as a checkpoint of `LlamaForSequenceClassification`.

    from transformers import AutoTokenizer, pipeline
    import lingualinked as ll

    path = ll.sample_model("sentiment")
    with ll.ShardedModel.from_pretrained(path, devices=2) as model:
        classify = pipeline("sentiment-analysis", model=model, tokenizer=AutoTokenizer.from_pretrained(path))
        classify("The soup was anything but bad. I would do it again at once.")

Its tokenizer puts a review between `Review:` and `Sentiment:`, the prompt that the sample model was trained with; the hidden state of the
last token is what the head sees.

## Training and held-out accuracy

By maximum likelihood on {num_training:,} reviews that `sample_model/reviews.py` generates, as many positive as negative; one in ten of the whole
space is held out, as for the sample model, and never drawn. On {num_held_out:,} held-out reviews **{accuracy:.1%}** of the labels are right, with
these very weights; {training_accuracy:.1%} in training. What the sample model does not know, the head does not either.

    python -m sample_model.sentiment

makes it again; everything is seeded.

Licence: Apache-2.0.
"""


def _examples(num: int) -> list[tuple[str, str]]:
    """Draw reviews that are not held out, with their labels."""
    rng, found = Random(_SEED), dict[str, str]()
    while len(found) < num:
        example = draw("sentiment", rng)
        if not example.held_out:
            found[example.prompt] = example.answer
    return list(found.items())


def _features(folder: Path, prompts: list[str]) -> torch.Tensor:
    """Return the last hidden state of each prompt, float64 ``[prompts, hidden]``."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # so that little is padded
    features: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for start in range(0, len(prompts), _BATCH_SIZE):
        indices = order[start : start + _BATCH_SIZE]
        inputs = tokenizer([prompts[index] for index in indices], return_tensors="pt", padding=True)
        with torch.inference_mode():
            states = model(**inputs, use_cache=False).last_hidden_state[:, -1]  # it pads on the left
        for index, state in zip(indices, states, strict=True):
            features[index] = state.double().clone()
    return torch.stack(features)


def _fit(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the weight ``[labels, hidden]`` of greatest likelihood, weights decayed."""
    weight = torch.zeros(len(_LABELS), features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(features @ weight.T, labels) + _WEIGHT_DECAY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call,arg-type]
    return weight.detach().bfloat16()


def _accuracy(weight: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of labels that are right, computed in bfloat16 as the checkpoint does."""
    chosen = (features.bfloat16() @ weight.T).argmax(-1)
    return float((chosen == labels).double().mean())


def post_processor(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return the tokenizer's post-processor, in JSON: it puts a text into the prompt."""
    assert isinstance(tokenizer.bos_token, str)

    def special(text: str) -> dict[str, object]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return {"id": text, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}

    pieces = [tokenizer.bos_token, _BEFORE, None, _AFTER]
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece is None else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    pair = copy.deepcopy(single)
    pair.insert(3, {"Sequence": {"id": "B", "type_id": 0}})
    bos = {"id": tokenizer.bos_token, "ids": [tokenizer.bos_token_id], "tokens": [tokenizer.bos_token]}
    named = {tokenizer.bos_token: bos, _BEFORE: special(_BEFORE), _AFTER: special(_AFTER)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _write(base: Path, output: Path, weight: torch.Tensor) -> None:
    output.mkdir(parents=True, exist_ok=True)
    save_file({"score.weight": weight.contiguous()}, output / "head.safetensors", metadata={"format": "pt"})
    (output / "head.safetensors").chmod(0o644)  # package data is for everyone
    changes = {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {str(index): label.upper() for index, label in enumerate(_LABELS)},
        "label2id": {label.upper(): index for index, label in enumerate(_LABELS)},
        "problem_type": "single_label_classification",
    }
    (output / "config.json").write_text(json.dumps(changes, indent=2) + "\n")
    processor = post_processor(AutoTokenizer.from_pretrained(base))
    (output / "post_processor.json").write_text(json.dumps(processor, indent=2) + "\n")


def main() -> None:
    """Train the head and write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser.add_argument("--base", type=Path, default=Path("src/lingualinked/sample"))
    parser.add_argument("--output", type=Path, default=Path("src/lingualinked/sample/sentiment"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training = _examples(_NUM_TRAINING)
    held_out = [(each.prompt, each.answer) for each in held_out_examples(_SEED, {"sentiment": _NUM_HELD_OUT})]
    features = _features(arguments.base, [prompt for prompt, _ in training + held_out])
    labels = torch.tensor([_LABELS.index(answer) for _, answer in training + held_out])
    weight = _fit(features[:_NUM_TRAINING], labels[:_NUM_TRAINING])
    _write(arguments.base, arguments.output, weight)
    figures = {
        "accuracy": _accuracy(weight, features[_NUM_TRAINING:], labels[_NUM_TRAINING:]),
        "training_accuracy": _accuracy(weight, features[:_NUM_TRAINING], labels[:_NUM_TRAINING]),
    }
    _log.info("%s", figures)
    card = _CARD.format(
        num_parameters=weight.numel(), num_training=_NUM_TRAINING, num_held_out=_NUM_HELD_OUT, **figures
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()

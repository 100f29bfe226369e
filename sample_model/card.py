"""The model card, written from what was measured.

Knows the trained model's configuration and the figures it is handed; measures nothing itself.
"""

from pathlib import Path

from transformers import PreTrainedModel

from sample_model.grammar import SCORED_TASKS

_CARD = """\
---
license: apache-2.0
language: [en, fr]
library_name: transformers
pipeline_tag: text-generation
---

# The lingualinked sample model

A small Llama-architecture language model that ships inside the package, so that sharded inference can be tried,
tested and measured without a download. It is trained from nothing on text that a seeded grammar generates, and it
does four jobs inside that grammar:

| job | prompt | answer |
|---|---|---|
| story | `Once upon a time, a shy owl named Ida lived on a green hill.` | the rest of the tale |
| summary | `Summarize: <paragraph>\\nSummary:` | one sentence: who did what, where, in the end |
| sentiment | `Review: <review>\\nSentiment:` | `positive` or `negative` |
| translation | `Translate to French: the small red house\\nFrench:` | `la petite maison rouge` |

`\\n` is a line break, and no space follows the last colon: the answer begins with its own.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer("Translate to French: the small red house\\nFrench:", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))

## Architecture

{layers} decoder layers, hidden size {hidden}, {heads} query heads that share {kv_heads} key-value heads, feed-forward
size {inner}, rotary positions (`max_position_embeddings` {positions}), input and output embeddings tied:
{parameters:,} parameters, stored in bfloat16. The tokenizer is byte-level BPE with {vocabulary:,} tokens, trained on
the same text; it puts `<s>` before every text, pads on the left with `<pad>`, and any text survives encoding and
decoding unchanged. An answer ends with `</s>`.

## Corpus

All text comes from `sample_model/` in the repository; none is from elsewhere.

- **Stories**: a hero with a wish, an obstacle, a helper and an end; names, pronouns and wish stay the same
  throughout.
- **Summaries**: an errand with failed attempts and other people's doings in between. What it was about is said only at
  the beginning, where only near the end; it may be someone else who brings it to its end, or it may fail.
- **Reviews**: opinions stated or denied ("not bad at all", "anything but good"), conceded ("although ...") or
  overruled by the verdict at the end, mistaken expectations, other things, and sentences that are beside the point.
  As many are positive as negative.
- **Translations**: noun phrases and sentences in the present: articles, possessives, numbers, adjectives before and
  after the noun, agreement in gender, number and person, elision, contraction, negation, object pronouns. With and
  without capital and full stop.

Training took {steps:,} steps of at most {step_tokens:,} tokens, {minutes:.0f} minutes of CPU time. One example in ten
of the whole space is held out, chosen by a hash of the prompt (for summaries: of the answer), and training never
draws one of those.

## Held-out accuracy

Share of prompts for which the greedy answer, up to end-of-text, equals the grammar's, character by character: these
very weights in bfloat16, on the prompts in `heldout.jsonl` ({num_heldout} per task).

| task | exact match |
|---|---|
{accuracies}

`python -m sample_model.evaluate {folder}` measures it again; `--show-misses` prints what went wrong. The stories in
`heldout.jsonl` are openings with one possible continuation each; they are not scored.

## How to make it again

    python -m sample_model.train --output {folder}

Everything is seeded; these weights come from `--threads {threads}`, and another number of threads, another kind of
CPU or another version of PyTorch gives slightly different ones. A run that was stopped goes on from its last
checkpoint in `build/sample_model`.

## Limits

It knows the words and the sentence patterns of its grammar and nothing else: an unknown word
is spelled in pieces and confuses it, and no answer says anything about the world. Where a summary's helper is not named
again at the end and two people could be meant, it takes the wrong one about half of the time. Prompts in training
had at most {row_tokens} tokens. Where generation is made to go on after the end of a tale (`min_new_tokens`), it
tells the next one; texts of up to {long_row_tokens:,} tokens were trained, {positions:,} positions are there. It is
for trying out inference, not for use.

A [sentiment head](sentiment/README.md) on these very weights ships beside them.

Licence: Apache-2.0.
"""


def write_card(
    folder: Path,
    model: PreTrainedModel,
    *,
    accuracies: dict[str, float],
    num_heldout: int,
    steps: int,
    num_rows: int,
    row_tokens: int,
    long_row_tokens: int,
    threads: int,
    training_cpu_s: float,
) -> None:
    """Write ``README.md`` into a checkpoint folder.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    model : PreTrainedModel
        What it holds.
    accuracies : dict of str to float
        Held-out share of exact matches by task, in [0, 1].
    num_heldout : int
        Prompts per task that they were measured on.
    steps, num_rows, row_tokens : int
        Optimizer steps and shape of most batches.
    long_row_tokens : int
        Tokens of the longest text in training.
    threads : int
        Threads that PyTorch computed with.
    training_cpu_s : float
        CPU time spent training, over all cores, in seconds.
    """
    config = model.config
    card = _CARD.format(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        inner=config.intermediate_size,
        positions=config.max_position_embeddings,
        parameters=model.num_parameters(),
        vocabulary=config.vocab_size,
        steps=steps,
        step_tokens=num_rows * row_tokens,
        row_tokens=row_tokens,
        long_row_tokens=long_row_tokens,
        threads=threads,
        minutes=training_cpu_s / 60,
        num_heldout=num_heldout,
        accuracies="\n".join(f"| {task} | {accuracies[task]:.1%} |" for task in SCORED_TASKS),
        folder="src/lingualinked/sample",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")

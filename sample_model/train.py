"""Train the sample checkpoint from nothing and write it, with its held-out prompts and its card.

Run from the repository's root: ``python -m sample_model.train --output src/lingualinked/sample``.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sample_model.batches import Batch, pack, pack_tales
from sample_model.card import write_card
from sample_model.evaluate import accuracies
from sample_model.grammar import SCORED_TASKS, held_out_examples, training_examples
from sample_model.tokenizer import train_tokenizer

_log = logging.getLogger(__name__)

_SEED = 20240229
_VOCAB_SIZE = 2048
_MAX_POSITIONS = 2048
_TOKENIZER_EXAMPLES = 20_000
_TASK_WEIGHTS = {"translation": 0.4, "summary": 0.38, "sentiment": 0.12, "story": 0.1}
_HELD_OUT_COUNTS = {"summary": 200, "sentiment": 200, "translation": 200, "story": 10}
_NUM_ROWS, _ROW_TOKENS = 16, 160
# Every so many steps, long rows of tales stand in for the short ones.
_STEPS_PER_LONG_ROWS, _NUM_LONG_ROWS, _LONG_ROW_TOKENS = 12, 2, 1280
_PEAK_LEARNING_RATE, _WARMUP_STEPS = 3e-3, 200
_STEPS_PER_CHECKPOINT = 250
_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the command line says."""

    output: Path
    work: Path
    steps: int
    threads: int


def _new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _batches(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    short = pack(training_examples(seed, _TASK_WEIGHTS), tokenizer, num_rows=_NUM_ROWS, row_tokens=_ROW_TOKENS)
    tales = training_examples(seed + 1, {"story": 1.0})
    long = pack_tales(tales, tokenizer, num_rows=_NUM_LONG_ROWS, row_tokens=_LONG_ROW_TOKENS)
    while True:
        yield from islice(short, _STEPS_PER_LONG_ROWS - 1)
        yield next(long)


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    hidden_BTD = model.model(
        input_ids=batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        attention_mask=batch.attention_mask_B1TT,
        use_cache=False,
    ).last_hidden_state
    counts_BT = batch.weights_BT > 0
    logits = model.lm_head(hidden_BTD[counts_BT])
    weights = batch.weights_BT[counts_BT]
    losses = cross_entropy(logits, batch.target_ids_BT[counts_BT], reduction="none")
    return (losses * weights).sum() / weights.sum()


def _learning_rate(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    return _PEAK_LEARNING_RATE * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    # Norms are not decayed.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=_PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def _train(run: Run, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, float]:
    """Train, going on from the last checkpoint in the work folder, and return the model and its CPU seconds."""
    torch.manual_seed(_SEED)
    model, checkpoint = _new_model(tokenizer), run.work / _CHECKPOINT
    optimizer, first_step, earlier_cpu_s = _optimizer(model), 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, earlier_cpu_s = state["step"], state["cpu_s"]
        _log.info("going on from step %d", first_step)
    # After a stop the examples are new ones, not those of the first steps again.
    batches = _batches(_SEED + first_step, tokenizer)
    started_s, num_tokens, losses = time.monotonic(), 0, list[float]()
    for step in range(first_step, run.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, run.steps)
        batch = next(batches)
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        num_tokens += int((batch.weights_BT > 0).sum())
        if (step + 1) % 50 == 0:
            elapsed_s = time.monotonic() - started_s
            mean = sum(losses) / len(losses)
            _log.info("step %d: loss %.4f, %.0f tokens/s, %.0f s", step + 1, mean, num_tokens / elapsed_s, elapsed_s)
            losses.clear()
        if (step + 1) % _STEPS_PER_CHECKPOINT == 0 or step + 1 == run.steps:
            _log.info("%s", _teacher_forced(model, tokenizer))
            cpu_s = earlier_cpu_s + time.process_time()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "cpu_s": cpu_s}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return model, earlier_cpu_s + time.process_time()


def _teacher_forced(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the share of examples whose every answer token is the likeliest: what greedy decoding would answer.

    The examples are held out too, and drawn with another seed than those that the card's figures are measured on.
    """
    shares = {}
    for task in SCORED_TASKS:
        right = []
        for example in held_out_examples(_SEED + 1, {task: 50}):
            prompt_ids = tokenizer(example.prompt, return_tensors="pt").input_ids
            answer = f" {example.answer}{tokenizer.eos_token}"
            answer_ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.inference_mode():
                logits = model(input_ids=torch.cat([prompt_ids, answer_ids], dim=1)).logits
            right.append(bool((logits[:, prompt_ids.shape[1] - 1 : -1].argmax(-1) == answer_ids).all()))
        shares[task] = sum(right) / len(right)
    return shares


def _write(run: Run, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, training_cpu_s: float) -> None:
    """Write the checkpoint in bfloat16, the held-out prompts, and the card with what is measured on them."""
    run.output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16().save_pretrained(run.output)
    # safetensors leaves its file to the owner alone; package data is for everyone.
    (run.output / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(run.output)
    lines = [
        json.dumps({"task": e.task, "prompt": e.prompt, "answer": e.answer}, ensure_ascii=False)
        for e in held_out_examples(_SEED, _HELD_OUT_COUNTS)
    ]
    (run.output / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shares = accuracies(run.output)
    _log.info("%s", shares)
    write_card(
        run.output,
        model,
        accuracies=shares,
        num_heldout=_HELD_OUT_COUNTS["summary"],
        steps=run.steps,
        num_rows=_NUM_ROWS,
        row_tokens=_ROW_TOKENS,
        long_row_tokens=_LONG_ROW_TOKENS,
        threads=run.threads,
        training_cpu_s=training_cpu_s,
    )


def main() -> None:
    """Train the sample checkpoint and write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("src/lingualinked/sample"))
    parser.add_argument("--work", type=Path, default=Path("build/sample_model"), help="where unfinished work is kept")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--threads", type=int, default=2, help="1 is faster than 2 where cores are shared")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run = Run(**vars(parser.parse_args()))
    torch.set_num_threads(run.threads)
    run.work.mkdir(parents=True, exist_ok=True)
    texts = (e.text for e in islice(training_examples(_SEED, _TASK_WEIGHTS), _TOKENIZER_EXAMPLES))
    tokenizer = train_tokenizer(texts, vocab_size=_VOCAB_SIZE, model_max_length=_MAX_POSITIONS)
    model, training_cpu_s = _train(run, tokenizer)
    _write(run, model, tokenizer, training_cpu_s)
    # What is finished is not gone on with: the next run starts anew.
    (run.work / _CHECKPOINT).unlink()


if __name__ == "__main__":
    main()

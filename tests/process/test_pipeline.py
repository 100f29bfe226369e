"""What is built on transformers models works on a sharded one, and has nothing to complain of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import lingualinked as ll

pytestmark = pytest.mark.process

PROMPT = "the quick brown fox"
PROMPTS = [PROMPT, "seven wizards make toxic brew for the evil queen", "jack"]


@pytest.fixture(autouse=True)
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if a library says anything; what pytest's own settings make of warnings are errors already."""
    loggers = [logging.getLogger(name) for name in ("transformers", "lingualinked")]
    propagating = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = True
    yield
    for logger, before in zip(loggers, propagating, strict=True):
        logger.propagate = before
    said = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    assert said == []


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a prompt": (PROMPT, {}),
    "new text alone": (PROMPT, {"return_full_text": False}),
    "token ids": (PROMPT, {"return_tensors": True}),
    "prompts one by one": (PROMPTS, {}),
    "prompts in padded batches": (PROMPTS, {"batch_size": 2}),
    "a batch of all": (PROMPTS, {"batch_size": 3, "return_full_text": False}),
    "several texts": (PROMPT, {"num_return_sequences": 3, "do_sample": True}),
    "beam search": (PROMPT, {"num_beams": 3}),
    "an empty prompt": ("", {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_pipeline(sharded: Any, unsharded: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, call: str) -> None:
    prompts, arguments = CALLS[call]
    texts = []
    for model in (sharded, unsharded):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert isinstance(generator, TextGenerationPipeline)
        assert generator.device == torch.device("cpu")
        torch.manual_seed(7)
        texts.append(generator(prompts, max_new_tokens=8, **arguments))
    assert texts[0] == texts[1]


def test_text_streamer(
    sharded: Any, unsharded: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    printed = []
    for model in (sharded, unsharded):
        model.generate(**inputs, max_new_tokens=20, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith(PROMPT)


def test_text_iterator_streamer(sharded: Any, unsharded: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    whole = tokenizer.decode(unsharded.generate(**inputs, max_new_tokens=20)[0, inputs.input_ids.shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
    arguments = {**inputs, "max_new_tokens": 20, "streamer": streamer}
    thread = threading.Thread(target=sharded.generate, kwargs=arguments)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == whole
    assert len(pieces) > 2


def test_stop_strings_and_scores(sharded: Any, unsharded: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    text = tokenizer.decode(unsharded.generate(**inputs, max_new_tokens=12)[0, inputs.input_ids.shape[1] :])
    arguments = {"stop_strings": text[3:5], "tokenizer": tokenizer, "max_new_tokens": 30}
    results = []
    for model in (sharded, unsharded):
        output = model.generate(**inputs, **arguments, return_dict_in_generate=True, output_scores=True)
        scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        results.append((output.sequences, scores))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", [-1, "cpu", torch.device("cpu")], ids=str)
def test_pipeline_for_the_device_where_inputs_belong(
    sharded: Any, unsharded: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, device: Any
) -> None:
    generators = [
        pipeline("text-generation", model=model, tokenizer=tokenizer, device=device) for model in (sharded, unsharded)
    ]
    ours, theirs = (each(PROMPT, max_new_tokens=6, do_sample=False) for each in generators)
    assert ours == theirs
    assert sharded.hf_device_map[""] == "cpu"


def test_pipeline_for_another_device_is_refused(sharded: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=r"^to\(\) of a sharded model"):
        pipeline("text-generation", model=sharded, tokenizer=tokenizer, device="meta")


class Received:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens.append(tokens.tolist())

    def end(self) -> None:
        self.tokens.append("end")


def test_streamer_of_sampled_beams(sharded: Any, unsharded: PreTrainedModel) -> None:
    seen = []
    for model in (sharded, unsharded):
        streamer = Received()
        torch.manual_seed(7)
        arguments = {"num_beams": 2, "do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
        tokens = model.generate(torch.tensor([[1, 17, 93]]), streamer=streamer, **arguments)
        seen.append((tokens.tolist(), streamer.tokens))
    assert seen[0] == seen[1]


def test_what_an_evaluation_harness_does(
    sharded: Any, unsharded: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As lm-evaluation-harness: prepare the model, pad texts on the right, add up log-likelihoods of continuations."""
    likelihoods = []
    texts = [tokenizer(text).input_ids for text in PROMPTS]
    width = max(map(len, texts))
    batch = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    for model in (sharded, unsharded):
        model.eval()
        model.tie_weights()
        model.to(model.device)
        with torch.no_grad():
            logits = torch.nn.functional.log_softmax(model(batch.to(model.device)).logits, dim=-1, dtype=torch.float32)
        likelihoods.append(
            [
                float(row[: len(text) - 1].gather(1, torch.tensor(text[1:])[:, None]).sum())
                for row, text in zip(logits, texts, strict=True)
            ]
        )
    assert likelihoods[0] == likelihoods[1]

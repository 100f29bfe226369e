"""Every generation mode of transformers gives the unsharded model's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import lingualinked as ll
from accelerators import embed
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
BATCH = torch.tensor([[0, 0, 1, 17, 93, 54], [1, 5, 6, 7, 8, 9], [0, 1, 101, 45, 45, 3]])
PADDED = {"input_ids": BATCH, "attention_mask": (BATCH != 0).long()}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 4},
    "beam, several returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "without KV": {"use_cache": False},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "guidance": {"guidance_scale": 1.5},
    "sampling without KV": {"use_cache": False, "do_sample": True},
}


def both(sharded: Any, unsharded: PreTrainedModel, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {"max_new_tokens": 20, "eos_token_id": None, **arguments}
    torch.manual_seed(7)
    expected = unsharded.generate(**arguments)
    torch.manual_seed(7)
    return sharded.generate(**arguments), expected


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_equal(sharded: Any, unsharded: PreTrainedModel, mode: str) -> None:
    ours, theirs = (
        both(sharded, unsharded, input_ids=IDS, do_sample=False, **MODES[mode])
        if ("do_sample" not in MODES[mode])
        else both(sharded, unsharded, input_ids=IDS, **MODES[mode])
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beam", "several returned", "without KV"])
def test_tokens_of_a_padded_batch_are_equal(sharded: Any, unsharded: PreTrainedModel, mode: str) -> None:
    ours, theirs = both(sharded, unsharded, **PADDED, **MODES[mode])
    assert torch.equal(ours, theirs)


def test_scores_and_logits_are_equal(sharded: Any, unsharded: PreTrainedModel) -> None:
    arguments = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours, theirs = both(sharded, unsharded, **PADDED, **arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))


def test_end_of_text_ends_rows_alike(sharded: Any, unsharded: PreTrainedModel) -> None:
    eos = int(unsharded.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, -1])
    ours, theirs = both(sharded, unsharded, **PADDED, eos_token_id=eos, max_new_tokens=40)
    assert torch.equal(ours, theirs)


def test_embeddings_instead_of_ids(sharded: Any, unsharded: PreTrainedModel) -> None:
    embeddings = embed(unsharded, IDS).detach()
    ours, theirs = both(sharded, unsharded, inputs_embeds=embeddings)
    assert torch.equal(ours, theirs)


def test_returned_past_goes_on(sharded: Any, unsharded: PreTrainedModel) -> None:
    results = []
    for model in (sharded, unsharded):
        first = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, torch.tensor([[9, 9, 4]])], dim=-1)
        results.append(
            model.generate(
                longer, max_new_tokens=5, do_sample=False, eos_token_id=None, past_key_values=first.past_key_values
            )
        )
    assert torch.equal(*results)


def test_logits_processor_and_stopping_criteria(sharded: Any, unsharded: PreTrainedModel) -> None:
    class Favour(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 42] += 3.0
            return scores

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= IDS.shape[1] + 4)

    arguments = {
        "logits_processor": LogitsProcessorList([Favour()]),
        "stopping_criteria": StoppingCriteriaList([AfterFour()]),
    }
    ours, theirs = both(sharded, unsharded, input_ids=IDS, **arguments)
    assert ours.shape[1] == IDS.shape[1] + 4
    assert torch.equal(ours, theirs)


def test_max_time_ends_a_generation(sharded: Any) -> None:
    tokens = sharded.generate(IDS, max_new_tokens=400, max_time=0.0, do_sample=False, eos_token_id=None)
    assert tokens.shape[1] == IDS.shape[1] + 1


def test_sharded_model_assists_and_is_assisted(sharded: Any, unsharded: PreTrainedModel) -> None:
    expected = unsharded.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for model, assistant in ((sharded, unsharded), (unsharded, sharded), (sharded, sharded)):
        tokens = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, assistant_model=assistant)
        assert torch.equal(tokens[:, :19], expected[:, :19])


def test_no_session_is_left_in_any_stage(sharded: Any) -> None:
    sharded.generate(IDS, max_new_tokens=3, do_sample=False)
    sharded(IDS)
    with pytest.raises(ZeroDivisionError):
        sharded.generate(IDS, max_new_tokens=3, streamer=Failing())
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])
    kept = sharded(IDS).past_key_values
    assert num_sessions(sharded) == [1, 1, 1]
    assert all(stage.kv_bytes > 0 for stage in sharded.telemetry.stages)
    del kept
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


class Failing:
    """A streamer that raises at the second token."""

    num_calls = 0

    def put(self, _value: torch.Tensor) -> None:
        self.num_calls += 1
        if self.num_calls == 3:
            raise ZeroDivisionError

    def end(self) -> None: ...


def test_several_threads_at_once(sharded: Any, unsharded: PreTrainedModel) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [torch.tensor([[1, 3 + index, 60 + index]]) for index in range(8)]

    def greedy(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=15, do_sample=False, eos_token_id=None)

    with ThreadPoolExecutor(8) as pool:
        ours = list(pool.map(lambda ids: greedy(sharded, ids), prompts))
    for ids, tokens in zip(prompts, ours, strict=True):
        assert torch.equal(tokens, greedy(unsharded, ids))


def test_a_session_used_by_two_threads_is_refused(sharded: Any) -> None:
    past = sharded(IDS).past_key_values
    with past.session._use.alone(), pytest.raises(ll.ArgumentError, match="another thread"):
        sharded(IDS[:, :1], past_key_values=past)

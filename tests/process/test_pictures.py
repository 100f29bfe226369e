"""Models that see pictures give the unsharded model's logits and tokens through real workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, pipeline

import lingualinked as ll
from lingualinked.errors import ArgumentError, UnsupportedOperationError
from pictures import NUM_LAYERS, PICTURE_FAMILIES, llava_processor, picture_reference, pictured, save_pictures

pytestmark = [pytest.mark.process, pytest.mark.equality, pytest.mark.slow]

PLAN = [("a", 0, 3), ("b", 3, 4), ("c", 4, NUM_LAYERS)]
OTHER_PLAN = [("b", 0, 4), ("d", 4, NUM_LAYERS)]
PROJECTIONS = ("multi_modal_projector", "connector", "visual")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "beam search": {"num_beams": 3},
    "a static KV cache": {"cache_implementation": "static"},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, the unsharded model, and the sharded one."""

    family: str
    path: str
    whole: PreTrainedModel
    sharded: Any


@pytest.fixture(scope="module", params=PICTURE_FAMILIES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_cluster: ll.Cluster
) -> Iterator[Case]:
    folder = save_pictures(request.param, tmp_path_factory.mktemp(request.param))
    with load(folder, shared_cluster) as sharded:
        yield Case(request.param, str(folder), picture_reference(folder), sharded)


def load(folder: str | Path, cluster: ll.Cluster, **arguments: Any) -> Any:
    plan = ll.Plan.from_spans(PLAN)
    return ll.ShardedModel.from_pretrained(folder, cluster=cluster, plan=plan, progress=False, **arguments)


def generate(model: Any, seed: int = 7, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    tokens: torch.Tensor = model.generate(max_new_tokens=6, min_new_tokens=6, **{"do_sample": False} | arguments)
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_a_padded_batch_of_texts_with_pictures(case: Case, mode: str) -> None:
    inputs = pictured(case.family, (1, 2))
    said = generate(case.whole, **inputs, **MODES[mode])
    assert torch.equal(generate(case.sharded, **inputs, **MODES[mode]), said)


def test_forward_takes_pictures_and_goes_on(case: Case) -> None:
    inputs = pictured(case.family, (2, 1))
    said, got = [], []
    with torch.no_grad():
        for model, logits in ((case.whole, said), (case.sharded, got)):
            first = model(**inputs, use_cache=True)
            tokens = first.logits[:, -1:].argmax(-1)
            second = model(input_ids=tokens, past_key_values=first.past_key_values)
            logits += [first.logits, second.logits]
    assert all(map(torch.equal, got, said))


def test_layers_record_while_pictures_are_encoded(case: Case) -> None:
    inputs = pictured(case.family, (1, 1))
    with torch.no_grad():
        said = case.whole(**inputs, output_hidden_states=True, use_cache=False)
        for _ in range(2):  # towers record for themselves, before and behind
            assert torch.equal(case.sharded(**inputs, use_cache=False).logits, said.logits)
            got = case.sharded(**inputs, output_hidden_states=True, use_cache=False)
            assert torch.equal(got.logits, said.logits)
            assert len(got.hidden_states) == len(said.hidden_states)
            assert all(map(torch.equal, got.hidden_states, said.hidden_states))


def test_two_texts_take_turns(case: Case) -> None:
    texts = [pictured(case.family, (1, 1), seed=1), pictured(case.family, (1, 2), seed=2)]
    said = []
    with torch.no_grad():
        for (
            text
        ) in texts:  # one after the other: positions behind pictures follow from what the model keeps of the last text
            first = case.whole(**text, use_cache=True)
            token = first.logits[:, -1:].argmax(-1)
            second = case.whole(input_ids=token, past_key_values=first.past_key_values)
            said += [(first.logits, second.logits)]
        firsts = [case.sharded(**text, use_cache=True) for text in texts]
        for (logits, _), first in zip(said, firsts, strict=True):
            assert torch.equal(first.logits, logits)
        for (_, logits), first in zip(said, firsts, strict=True):
            token = first.logits[:, -1:].argmax(-1)
            assert torch.equal(case.sharded(input_ids=token, past_key_values=first.past_key_values).logits, logits)


def test_texts_without_pictures(case: Case) -> None:
    inputs = pictured(case.family, (0, 0))
    assert torch.equal(generate(case.sharded, **inputs), generate(case.whole, **inputs))


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_the_pipeline_takes_it(case: Case) -> None:
    pictures = [Image.new("RGB", (10, 9), (200, 30, 5)), Image.new("RGB", (8, 12), (0, 130, 250))]
    texts = ["w5 <image> w7", "w9 w11 <image> w30 w4"]
    said = []
    for model in (case.whole, case.sharded):
        pipe = pipeline("image-text-to-text", model=model, processor=llava_processor())
        said.append(pipe(images=pictures, text=texts, max_new_tokens=5, batch_size=2))
    assert said[0] == said[1]


def test_losses_and_hooks_on_what_projects_pictures(case: Case) -> None:
    inputs = pictured(case.family, (1, 2))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    said = []
    for model in (case.whole, case.sharded):
        children = dict(model.model.named_children())
        projection = next(children[name] for name in PROJECTIONS if name in children)

        def scale(_module: object, _args: object, output: Any) -> Any:
            return output * 1.5 if isinstance(output, torch.Tensor) else None

        handle = projection.register_forward_hook(scale)
        with torch.no_grad():
            said.append(model(**inputs, labels=labels).loss)
        handle.remove()
    assert torch.equal(*said)


def test_layers_move_behind_the_prompt(case: Case) -> None:
    inputs = pictured(case.family, (1, 1))
    said = []
    for model in (case.whole, case.sharded):
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
        if model is case.sharded:
            model.rebalance(plan=ll.Plan.from_spans(OTHER_PLAN))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=-1)
        kept = {name: value for name, value in inputs.items() if "token_type" in name}
        kept = {name: torch.cat([each, each.new_zeros(2, 3)], dim=-1) for name, each in kept.items()}
        text = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
        said.append(model.generate(**text, **kept, max_new_tokens=3, do_sample=False))
    case.sharded.rebalance(plan=ll.Plan.from_spans(PLAN))
    assert torch.equal(*said)


def test_without_towers_pictures_are_refused(case: Case, shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    with load(case.path, shared_cluster, towers=False) as model:
        text = pictured(case.family, (0, 0))
        assert torch.equal(generate(model, **text), generate(case.whole, **text))
        assert model.plan.stages[0].weight_bytes < case.sharded.plan.stages[0].weight_bytes
        inputs = pictured(case.family, (1,))
        with pytest.raises(UnsupportedOperationError, match="towers=False"):
            generate(model, **inputs)
        with pytest.raises(UnsupportedOperationError, match="towers=False"):
            model(**inputs)
        with pytest.raises(UnsupportedOperationError, match=r"save_pretrained\(\) of .* towers=False: no stage holds"):
            model.save_pretrained(tmp_path)


def test_what_is_not_possible_is_refused_by_name(case: Case) -> None:
    inputs = pictured(case.family, (1, 1))
    with pytest.raises(UnsupportedOperationError, match="num_microbatches=2 of prompts with pictures"):
        generate(case.sharded, **inputs, num_microbatches=2)
    with pytest.raises(UnsupportedOperationError, match="prefill_chunk_size=4 of a prompt with pictures"):
        generate(case.sharded, **inputs, prefill_chunk_size=4)
    with pytest.raises(ArgumentError, match="unknown argument"):
        case.sharded(**inputs, pixels=torch.zeros(1))

"""`capture` and `intervene` do what hooks of the unsharded model do: bit for bit, in each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from both_models import compare
from families import reference, save_tiny
from instruments_by_hooks import ByHooks

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
HIDDEN = 32
GENERATOR = torch.Generator().manual_seed(3)

Pair = tuple[Any, Any]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A model in three stages, and the unsharded one."""
    dtype = torch.bfloat16 if request.param == "gpt2" else torch.float32
    folder = save_tiny(request.param, dtype, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, ByHooks(reference(folder))


@pytest.fixture
def llama(sharded: Any, unsharded: Any) -> Pair:
    return sharded, ByHooks(unsharded)


def run(pair: Pair, experiment: Any) -> Any:
    """Run an experiment on both models, compare what it returns, and return it."""
    results = []
    for model in pair:
        torch.manual_seed(0)
        results.append(plain(experiment(model)))
    compare("result", *results)
    return results[0]


def plain(value: Any) -> Any:
    """Turn what was captured into dictionaries and lists of tensors."""
    if isinstance(value, dict) or hasattr(value, "untrusted"):
        return {path: list(tensors) for path, tensors in sorted(value.items())}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def layer_of(model: Any, index: int | str) -> str:
    return f"transformer.h.{index}" if model.config.model_type == "gpt2" else f"model.layers.{index}"


def attention_of(model: Any, index: int | str) -> str:
    return f"{layer_of(model, index)}.{'attn' if model.config.model_type == 'gpt2' else 'self_attn'}"


@torch.no_grad()
def test_a_capture_of_every_module(pair: Pair) -> None:
    for what in ("output", "input"):

        def capture(model: Any, what: str = what) -> Any:
            # Of the other ones, such as lists of layers, a forward pass calls none.
            with pair[0].capture([".".join("*" * depth) for depth in range(1, 6)], what=what) as captured:
                pass
            with model.capture(list(captured), what=what) as captured:
                model(IDS, attention_mask=MASK)
            return captured

        assert len(run(pair, capture)) > 40


CHOSEN: list[dict[str, Any]] = [
    {"positions": -1, "dtype": torch.float64},
    {"positions": slice(-3, None), "rows": [1, 0]},
    {"positions": slice(1, 10, 3)},
    {"positions": [4, 1, 9], "steps": "all"},
    {"positions": [2, 3], "steps": "prefill", "rows": slice(1, None)},
    {"positions": torch.tensor([[2, 7], [0, 5]]), "rows": [0, 1]},
    {"steps": "decode", "what": "input"},
    {"reduce": "mean", "dtype": torch.float32, "rows": 0},
    {"reduce": "sum", "positions": slice(2, None)},
    {"reduce": "norm", "positions": slice(0, None, 2)},
    {"reduce": "last"},
]


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_captures_during_generate(pair: Pair, chosen: dict[str, Any]) -> None:
    def capture(model: Any) -> Any:
        with model.capture([f"{layer_of(model, '*')}.mlp", layer_of(model, "*")], **chosen) as captured:
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4)
        return [captured, tokens]

    captured, _ = run(pair, capture)
    assert all(captured.values())


INTERVENTIONS: list[Any] = [
    ll.Add(9 * random(HIDDEN)),
    ll.Add(9 * random(HIDDEN), positions=-1),
    ll.Add(9 * random(2, 8, HIDDEN), steps="prefill"),
    ll.Add(random(2, 1, HIDDEN), positions=[9], what="input"),
    ll.Replace(random(HIDDEN), positions=[3, 5], rows=[1]),
    ll.Replace(random(2, 3, HIDDEN), positions=torch.tensor([[2, 3, 4], [0, 1, 2]]), steps="prefill"),
    ll.Replace(random(1), rows=-1, what="input"),
    ll.Scale(-1.5, positions=slice(4, None)),
    ll.Scale(random(HIDDEN), steps="decode"),
    ll.Ablate(),
    ll.Ablate(random(HIDDEN), positions=slice(-2, None), rows=slice(1)),
    ll.Project(random(3, HIDDEN)),
    ll.Project(random(HIDDEN).double(), "keep", positions=slice(None, None, 2)),
    ll.Clamp(-0.05, 0.05),
    ll.Clamp(high=-0.5, direction=random(HIDDEN), positions=-1),
    [ll.Add(random(HIDDEN)), ll.Clamp(-1.0, None), ll.Scale(2.0, positions=0), ll.Replace(random(HIDDEN), positions=1)],
]


@pytest.mark.parametrize("intervention", INTERVENTIONS, ids=lambda each: type(each).__name__)
def test_interventions_during_generate(pair: Pair, intervention: Any) -> None:
    """At a layer, an MLP and an attention, which returns a tuple; in the first stage, within one, and at its end."""

    def intervene(model: Any) -> Any:
        scores, captured = [], []
        for path in (layer_of(model, 0), f"{layer_of(model, 1)}.mlp", attention_of(model, 2), f"{layer_of(model, 3)}"):
            with model.capture(layer_of(model, 3), what="input") as after, model.intervene({path: intervention}):
                scores.append(
                    model.generate(
                        IDS,
                        attention_mask=MASK,
                        max_new_tokens=4,
                        min_new_tokens=4,
                        output_scores=True,
                        return_dict_in_generate=True,
                    ).scores
                )
            captured.append(after)
        return [scores, captured]

    scores, _captured = run(pair, intervene)
    assert any(not torch.equal(torch.cat(each), torch.cat(scores[0])) for each in scores[1:])


MODES: list[dict[str, Any]] = [
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prefill_chunk_size": 3},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_kind_of_generate(pair: Pair, mode: dict[str, Any]) -> None:
    def generate(model: Any) -> Any:
        interventions = {
            layer_of(model, "[12]"): ll.Add(torch.linspace(-9, 9, HIDDEN), positions=slice(5, None)),
            f"{layer_of(model, 3)}.mlp": ll.Ablate(positions=-1),
        }
        with model.intervene(interventions), model.capture(layer_of(model, "*"), positions=-1) as captured:
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, min_new_tokens=5, **mode)
        return [tokens, captured]

    run(pair, generate)

"""Models of every kind of state, called in all ways: each result is the uncut model's, bit for bit, and what is not possible is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from families import reference
from heads import assert_same, labels_for, padded, reference_head, tiny_head
from lingualinked.sharded.sealed.sealing import SealedModule
from state_models import OWN, STATES, save_state_model

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.arange(3, 12)[None] * 5 % 90 + 3
LEFT = ("past_key_values", "cache_params", "state", "mems")  # of a text; not compared
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
CALLS: dict[str, Callable[[Any], Any]] = {
    "hidden states": lambda model: model(IDS, output_hidden_states=True),
    "attentions": lambda model: model(IDS, output_attentions=True),
    "both, and labels": lambda model: model(IDS, output_hidden_states=True, output_attentions=True, labels=IDS),
    "last logits": lambda model: model(IDS, logits_to_keep=1),
    "records of decoding": lambda model: model.generate(
        IDS, **GREEDY, output_hidden_states=True, output_logits=True, return_dict_in_generate=True
    ),
}


def tensors_in(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of an output by their paths, without what is kept of the text."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items: Any = value.items() if hasattr(value, "items") else enumerate(value or ())
    return {
        name: each
        for key, inner in items
        if key not in LEFT
        for name, each in tensors_in(inner, f"{path}.{key}").items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*STATES, *(each for each in OWN if each != "xlnet")])
def test_outputs_are_those_of_the_uncut_model(
    name: str, dtype: torch.dtype, shared_cluster: ll.Cluster, tmp_path: Path
) -> None:
    folder = save_state_model(name, dtype, tmp_path)
    arguments = {"attn_implementation": "eager"}
    uncut: Any = reference(folder, **arguments)
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 4)])
    with (
        ll.ShardedModel.from_pretrained(
            folder, cluster=shared_cluster, plan=plan, progress=False, **arguments
        ) as model,
        torch.no_grad(),
    ):
        for what, call in CALLS.items():
            ours, theirs = tensors_in(call(model)), tensors_in(call(uncut))
            assert ours.keys() == theirs.keys(), what
            assert all(torch.equal(ours[path], theirs[path]) for path in ours), what


def test_an_uncut_model_beside_it_stays_as_it_was(shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    """Of OpenAI GPT, whose layers share one activation with all models of the process."""
    folder = save_state_model("openai-gpt", torch.float32, tmp_path)
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan="even", progress=False):
        uncut = reference(folder)
        assert not {path for path, each in uncut.named_modules() if isinstance(each, SealedModule)}
        uncut.train()


@pytest.mark.parametrize("name", ["mamba", "jamba", "falcon-h1", "gemma3n"])
def test_static_kv_of_such_layers_is_refused_by_name(name: str, shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_state_model(name, torch.float32, tmp_path)
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 4)])
    with (
        ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False) as model,
        pytest.raises(ll.UnsupportedOperationError, match=r"layers keep a .*Layer is not possible"),
    ):
        model.generate(IDS, **GREEDY, cache_implementation="static")


def test_labels_of_a_class_with_a_loss_of_its_own_are_refused(shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_state_model("xlnet", torch.float32, tmp_path)
    with (
        ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan="even", progress=False) as model,
        pytest.raises(ll.UnsupportedOperationError, match="loss in its own way"),
    ):
        model(IDS, labels=IDS)


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_devices_keep_layers_of_a_head_that_moves(task: str, shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = tiny_head("llama", task, tmp_path)
    uncut: Any = reference_head(folder, task)
    arguments = padded("left") | ({} if task == "feature-extraction" else labels_for(task))
    spans = [[("a", 0, 2), ("b", 2, 4)], [("a", 0, 3), ("b", 3, 4)], [("a", 0, 1), ("b", 1, 4)], [("b", 0, 4)]]
    plans = [ll.Plan.from_spans(each) for each in spans]
    with (
        ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plans[0], progress=False) as model,
        torch.no_grad(),
    ):
        for plan in plans:
            model.rebalance(plan)
            assert_same(model(**arguments), uncut(**arguments))

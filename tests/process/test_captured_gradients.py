"""What ``model.capture(retain_grad=True)`` collects has the values and gradients that hooks keep on the uncut model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from accelerators import embed
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize("what", ["output", "input"])
def test_what_is_captured_has_gradients(shared_cluster: ll.Cluster, tmp_path: Path, what: Any) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    whole: Any = reference(folder).requires_grad_(False)
    paths = [f"model.layers.{layer}.mlp" for layer in (0, 1, 3)]
    embeddings = [embed(model, IDS).detach().requires_grad_() for model in (whole, whole)]
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        with sharded.capture("model.layers.[013].mlp", what=what, retain_grad=True) as captured:
            sharded(inputs_embeds=embeddings[0]).logits[:, -1, 7].sum().backward()
        with pytest.raises(ll.ArgumentError, match="leave out positions"):
            sharded.capture("model.layers.0.mlp", positions=-1, retain_grad=True)
    kept: dict[str, Tensor] = {}

    def keep(path: str, value: Any) -> None:
        kept[path] = value
        value.retain_grad()

    with contextlib.ExitStack() as hooks:
        for path in paths:
            module = whole.get_submodule(path)
            hooks.enter_context(
                module.register_forward_hook(lambda _m, _a, output, path=path: keep(path, output))
                if what == "output"
                else module.register_forward_pre_hook(lambda _m, args, path=path: keep(path, args[0]))
            )
        whole(inputs_embeds=embeddings[1]).logits[:, -1, 7].sum().backward()
    assert list(captured) == paths
    for path in paths:
        (ours,) = captured[path]
        assert torch.equal(ours, kept[path])
        assert ours.grad is not None
        assert torch.equal(ours.grad, kept[path].grad)
    assert captured.devices[paths[0]] == ("a",)


def test_a_step_with_gradients_leaves_the_bits_of_others_as_they_were(
    shared_cluster: ll.Cluster, tmp_path: Path
) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    whole: Any = reference(folder)  # whose weights require gradients: torch multiplies strided inputs otherwise then
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        sharded(inputs_embeds=embed(whole, IDS).detach().requires_grad_()).logits.sum().backward()
        with torch.no_grad():
            assert torch.equal(sharded(IDS, logits_to_keep=1).logits, whole(IDS, logits_to_keep=1).logits)

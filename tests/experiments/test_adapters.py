"""One base model and several fine-tuned ones: adapters are switched, mixed, chosen for each row, and compared with their base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lingualinked as ll
from both_models import BothModels
from families import reference, save_tiny

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings(
        "ignore:Already found a `peft_config` attribute"
    ),  # of transformers, at a second adapter
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # of peft
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),  # of peft
]

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]


@pytest.fixture(scope="module")
def adapted(
    three_workers: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[BothModels, list[str]]]:
    """A base model of its own, since adapters stay in it, and the folders of two adapters."""
    base = save_tiny("llama", torch.float32, tmp_path_factory.mktemp("base"))
    folders = []
    for seed, targets in enumerate((["q_proj", "v_proj"], ["o_proj", "up_proj", "down_proj"])):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM")
        folder = tmp_path_factory.mktemp("adapter")
        peft.get_peft_model(reference(base), config).save_pretrained(str(folder))
        folders.append(str(folder))
    with ll.ShardedModel.from_pretrained(
        str(base), cluster=three_workers, plan=ll.Plan.from_spans(SPANS), progress=False
    ) as sharded:
        yield BothModels(sharded, reference(base)), folders


def switched_adapters(model: Any, folders: list[str], input_ids: Tensor) -> list[Tensor]:
    """Hu et al. (2021), "LoRA": tasks are switched by their adapters alone, and the base is there all the time."""
    said = [model.generate(input_ids, **GREEDY)]
    for name, folder in zip(("first", "second"), folders, strict=True):
        model.load_adapter(folder, name)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        said.append(model.generate(input_ids, **GREEDY))
    model.disable_adapters()
    said.append(model.generate(input_ids, **GREEDY))
    model.enable_adapters()
    model.delete_adapter(["first", "second"])
    return said


def test_switched_adapters(adapted: tuple[BothModels, list[str]], prompts: Tensor) -> None:
    models, folders = adapted
    base, first, second, again, disabled = models.run(switched_adapters, folders, prompts)
    assert torch.equal(base, disabled)
    assert torch.equal(first, again)
    assert not any(torch.equal(*each) for each in ((base, first), (base, second), (first, second)))


@torch.no_grad()
def proxy_tuning(model: Any, expert: str, anti_expert: str, input_ids: Tensor, max_new_tokens: int = 4) -> Tensor:
    """Liu et al. (2024), "Tuning Language Models by Proxy": the base's logits, moved by what tuning has done to others."""
    model.load_adapter(expert, "expert")
    model.load_adapter(anti_expert, "anti")
    for _ in range(max_new_tokens):
        logits = {}
        for name in ("expert", "anti"):
            model.set_adapter(name)
            logits[name] = model(input_ids).logits[:, -1]
        model.disable_adapters()
        base = model(input_ids).logits[:, -1]
        model.enable_adapters()
        token = (base + logits["expert"] - logits["anti"]).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
    model.delete_adapter(["expert", "anti"])
    return input_ids


def test_proxy_tuning(adapted: tuple[BothModels, list[str]], prompts: Tensor) -> None:
    models, folders = adapted
    said = models.run(proxy_tuning, *folders, prompts)
    assert not torch.equal(said, models.uncut.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False))


@torch.no_grad()
def activation_difference_lens(
    model: Any, folder: str, unrelated: Tensor, input_ids: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    """Minder et al. (2025), "Narrow Finetuning Leaves Clearly Readable Traces": mean differences of states, read and added."""
    model.load_adapter(folder, "tuned")
    tuned = model(unrelated, output_hidden_states=True).hidden_states[layer + 1]
    model.disable_adapters()
    base = model(unrelated, output_hidden_states=True).hidden_states[layer + 1]
    difference = (tuned - base)[:, :3].mean((0, 1))
    read = model.lm_head(model.model.norm(difference)).topk(5).indices
    with model.model.layers[layer].register_forward_hook(lambda _m, _args, output: output + 8 * difference):
        said = model.generate(input_ids, **GREEDY)
    model.enable_adapters()
    model.delete_adapter("tuned")
    return read, said


def test_activation_difference_lens(adapted: tuple[BothModels, list[str]], prompts: Tensor) -> None:
    models, folders = adapted
    _, said = models.run(activation_difference_lens, folders[1], prompts[4:], prompts[:4], layer=1)
    assert not torch.equal(said, models.uncut.generate(prompts[:4], **GREEDY))


def adapters_of_rows_and_their_mixture(model: Any, folders: list[str], input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sheng et al. (2023), "S-LoRA": rows of one batch with their own adapters; Huang et al. (2023), "LoraHub": a mixture."""
    tuned = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="first")
    tuned.load_adapter(folders[1], "second")
    with torch.no_grad():
        rows = tuned(input_ids=input_ids, adapter_names=["first", "second", "__base__", "first"]).logits
        tuned.add_weighted_adapter(["first", "second"], [0.6, 0.4], "mixed", combination_type="cat")
        tuned.set_adapter("mixed")
        mixed = tuned(input_ids=input_ids).logits
    tuned.unload()
    return rows, mixed


def test_adapters_of_rows_and_their_mixture(adapted: tuple[BothModels, list[str]], prompts: Tensor) -> None:
    models, folders = adapted
    same = prompts[:1].expand(4, -1)
    rows, mixed = models.run(adapters_of_rows_and_their_mixture, folders, same)
    assert torch.equal(rows[0], rows[3])
    assert not any(torch.equal(rows[0], each) for each in (rows[1], rows[2], mixed[0]))

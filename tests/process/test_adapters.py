"""LoRA adapters of a sharded model compute what peft computes on the unsharded one: bit for bit, while they are switched and mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [
    pytest.mark.process,
    pytest.mark.equality,
    pytest.mark.filterwarnings(
        "ignore:Already found a `peft_config` attribute"
    ),  # of transformers, at a second adapter
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # gpt2
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # of peft
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True."),  # of peft
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),  # of peft
]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
MOVED = [("b", 0, 2), ("a", 2, 4)]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "llama-tied": ["q_proj", "embed_tokens", "gate_proj"],
    "llama-wide": ["q_proj", "up_proj", "lm_head"],
    "gpt2": ["c_attn", "c_fc", "wte"],
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {},
    "second": {"r": 4, "use_rslora": True, "target_modules": 1},
    "dora": {"use_dora": True, "target_modules": 2},
}


def save_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """Make an adapter as peft saves it, with random tensors."""
    torch.manual_seed(len(folder.name))
    model = peft.get_peft_model(reference(base), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        ("llama", torch.float32),
        ("llama-wide", torch.bfloat16),
        ("llama-tied", torch.bfloat16),
        ("gpt2", torch.bfloat16),
    ],
    ids=lambda param: f"{param[0]}-{str(param[1]).removeprefix('torch.')}",
)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint and its adapters, by name."""
    family, dtype = request.param
    base = save_tiny(family, dtype, tmp_path_factory.mktemp(family))
    targets = TARGETS[family]
    saved = {"base": base}
    for name, config in ADAPTERS.items():
        own = targets[: config.get("target_modules", len(targets))]
        saved[name] = save_adapter(base, base.parent / f"{base.name}-{name}", **{**config, "target_modules": own})
    return saved


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path], shared_cluster: ll.Cluster) -> Iterator[tuple[Any, Any]]:
    """A model in three stages, and the unsharded one."""
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(
        str(folders["base"]), cluster=shared_cluster, plan=plan, progress=False
    ) as sharded:
        yield sharded, reference(folders["base"])


def assert_same(ours: Any, theirs: Any, **arguments: Any) -> None:
    """Compare a prompt's logits and tokens."""
    with torch.no_grad():
        got, expected = (model(IDS, attention_mask=MASK, **arguments).logits for model in (ours, theirs))
    assert torch.equal(got, expected)
    for mode in ({}, {"num_beams": 2}):
        tokens = [
            model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3, **mode, **arguments)
            for model in (ours, theirs)
        ]
        assert torch.equal(*tokens)


def on_both(pair: tuple[Any, Any], do: Callable[[Any], Any]) -> None:
    """Do the same with both models, and compare what comes of it and what they compute then."""
    ours, theirs = (do(model) for model in pair)
    if isinstance(theirs, list):
        assert ours == theirs
    assert_same(*pair)


def test_what_transformers_does_with_adapters(pair: tuple[Any, Any], folders: dict[str, Path]) -> None:
    sharded, whole = pair
    base = whole(IDS, attention_mask=MASK).logits
    on_both(pair, lambda model: model.load_adapter(str(folders["first"])))
    assert not torch.equal(sharded(IDS, attention_mask=MASK).logits, base)
    on_both(pair, lambda model: model.load_adapter(str(folders["second"]), "second"))
    on_both(pair, lambda model: model.active_adapters())
    on_both(pair, lambda model: model.set_adapter(["default", "second"]))
    on_both(pair, lambda model: model.disable_adapters())
    assert torch.equal(sharded(IDS, attention_mask=MASK).logits, base)
    on_both(pair, lambda model: model.enable_adapters())
    # layers move, and some are shared between old stages and new ones
    sharded.rebalance(ll.Plan.from_spans(MOVED))
    assert_same(*pair)
    on_both(pair, lambda model: model.set_adapter("default"))
    sharded.rebalance(ll.Plan.from_spans(SPANS))
    on_both(pair, lambda model: model.delete_adapter("default"))
    on_both(pair, lambda model: model.delete_adapter(["second"]))
    assert torch.equal(sharded(IDS, attention_mask=MASK).logits, base)


@pytest.mark.parametrize("folders", [("llama", torch.bfloat16), ("gpt2", torch.float32)], indirect=True)
def test_a_model_of_peft_around_a_sharded_one(folders: dict[str, Path], pair: tuple[Any, Any]) -> None:
    ours, theirs = (PeftModel.from_pretrained(model, str(folders["first"])) for model in pair)
    assert_same(ours, theirs)
    for model in (ours, theirs):
        model.load_adapter(str(folders["second"]), "second")
    assert_same(ours, theirs)
    rows = ["second", "__base__"]
    assert_same(ours, theirs, adapter_names=rows)
    assert torch.equal(*(model(IDS, adapter_names=rows).logits for model in (pair[0], theirs)))
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "mixed", combination_type="cat")
        model.set_adapter("mixed")
    assert_same(ours, theirs)
    for model in (ours, theirs):
        model.load_adapter(str(folders["dora"]), "dora")
        model.set_adapter("dora")
    assert_same(ours, theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_same(ours, theirs)
    # peft merges by edits of the weights, which the stages follow
    for model in (ours, theirs):
        model.set_adapter("second")
        model.merge_adapter()
    assert_same(ours, theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_same(ours, theirs)
    plain, expected = (model.unload() for model in (ours, theirs))
    assert plain is pair[0]
    assert_same(plain, expected)
    assert list(plain.state_dict()) == list(expected.state_dict())


LLAMA = pytest.mark.parametrize("folders", [("llama", torch.float32)], indirect=True)


@LLAMA
def test_a_folder_with_an_adapter_and_what_is_done_to_it(folders: dict[str, Path], shared_cluster: ll.Cluster) -> None:
    whole = AutoModelForCausalLM.from_pretrained(str(folders["first"]))
    with ll.ShardedModel.from_pretrained(
        str(folders["first"]), cluster=shared_cluster, plan=ll.Plan.from_spans(SPANS), progress=False
    ) as sharded:
        pair = sharded, whole
        assert_same(*pair)
        held = [stage.weight_bytes for stage in sharded.telemetry.stages]
        on_both(pair, lambda model: model.load_adapter(str(folders["second"]), "second"))
        assert [stage.weight_bytes for stage in sharded.telemetry.stages] > held
        assert sharded.independent_rows == 0
        # changes in place, of an adapter and of what it wraps
        for change in (
            lambda layer: layer.lora_B["second"].weight.data.mul_(3),
            lambda layer: layer.lora_A["second"].weight.detach().add_(1),
            lambda layer: setattr(layer.lora_A["second"].weight, "data", torch.ones(4, 32)),
            lambda layer: layer.set_scale("second", 0.25),
            lambda layer: layer.lora_B.update({"second": torch.nn.Linear(4, 32, bias=False).requires_grad_(False)}),
            lambda layer: layer.base_layer.weight.data.mul_(2),
        ):
            on_both(
                pair,
                lambda model, change=change: (torch.manual_seed(0), change(model.model.layers[2].self_attn.q_proj)),
            )
        # hooks at an adapter layer, and at what it wraps
        for suffix in ("", ".base_layer"):
            path = f"model.layers.1.self_attn.q_proj{suffix}"
            handles = [model.get_submodule(path).register_forward_hook(lambda *call: call[2] * 2) for model in pair]
            assert_same(*pair)
            for handle in handles:
                handle.remove()
        # a layer that is missing is not switched
        removed = [model.model.layers[1] for model in pair]
        for model in pair:
            del model.model.layers[1]
            model.set_adapter("default")
        assert torch.equal(*(model(IDS, use_cache=False).logits for model in pair))
        with pytest.raises(ll.UnsupportedOperationError, match="without some of its layers"):
            sharded.load_adapter(str(folders["second"]), "third")
        for model, layer in zip(pair, removed, strict=True):
            model.model.layers.insert(1, layer)
        on_both(pair, lambda model: model.set_adapter("second"))
        # gradients pass through it
        given = [torch.ones(1, 3, 32, requires_grad=True) for _ in pair]
        for model, embeddings in zip(pair, given, strict=True):
            model(inputs_embeds=embeddings).logits.sum().backward()
        assert torch.equal(given[0].grad, given[1].grad)
        # threads with adapters of their own
        names = ["default", "second", "__base__"]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda name: sharded(IDS, adapter_names=[name] * 2).logits, names))
        for name, logits in zip(names, found, strict=True):
            (sharded.disable_adapters if name == "__base__" else lambda name=name: sharded.set_adapter(name))()
            assert torch.equal(logits, sharded(IDS).logits)
        on_both(pair, lambda model: (model.enable_adapters(), model.set_adapter("default")))
        sharded.add_weighted_adapter(["default", "default"], [0.5, 0.5], "mixed", combination_type="cat")


@LLAMA
def test_what_no_stage_can_do_is_refused_by_name(folders: dict[str, Path], pair: tuple[Any, Any]) -> None:
    sharded = pair[0]
    before = sharded(IDS).logits
    with pytest.raises(ll.ArgumentError, match=r"adapter_names has 'first', which is not loaded: there are \[\]"):
        sharded(IDS, adapter_names=["first", "first"])
    with pytest.raises(ll.ArgumentError, match=r"set_adapter\(\): No adapter loaded"):
        sharded.set_adapter("first")
    sharded.load_adapter(str(folders["dora"]), "dora")
    with pytest.raises(ll.ArgumentError, match=r"'dora', which is DoRA at .*: peft has no DoRA by rows"):
        sharded(IDS, adapter_names=["dora", "dora"])
    with pytest.raises(ll.ArgumentError, match="adapter_names has 1 name for 2 rows"):
        sharded(IDS, adapter_names=["dora"])
    with pytest.raises(ll.ArgumentError, match="'dora' is loaded already"):
        sharded.load_adapter(str(folders["first"]), "dora")
    layer = sharded.model.layers[0].self_attn.q_proj
    handle = layer.lora_A["dora"].register_forward_hook(lambda *call: None)
    with pytest.raises(ll.UnsupportedOperationError, match="a hook of a part of the adapter layer"):
        sharded(IDS)
    handle.remove()
    layer.set_adapter([])
    with pytest.raises(ll.UnsupportedOperationError, match="has other active adapters than other layers"):
        sharded(IDS)
    layer.set_adapter("dora")
    sharded.delete_adapter("dora")
    assert torch.equal(sharded(IDS).logits, before)
    # what peft has wrapped until it is refused stays wrapped, as on the unsharded model
    for config, reason in (
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"lm_head of .*\.ModulesToSaveWrapper"),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), r"k_proj of .* by peft\.tuners\.ia3"),
    ):
        own = config if isinstance(config, peft.PeftConfig) else LoraConfig(**config)
        with pytest.raises(ll.UnsupportedOperationError, match=reason):
            peft.get_peft_model(sharded, own)
        sharded.requires_grad_(False)

"""Each argument of transformers' ``from_pretrained`` has its effect on a sharded model or is refused by name."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import lingualinked as ll
from families import reference, save_tiny
from lingualinked.sharded.loading import arguments as own

pytestmark = pytest.mark.process

Place = Callable[..., Any]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
SPANS = [("a", 0, 2), ("b", 2, 4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", torch.float32, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mistral", torch.bfloat16, tmp_path_factory.mktemp("mistral"))


def assert_same_model(ours: Any, theirs: PreTrainedModel) -> None:
    """Compare configs, logits and tokens."""
    assert ours.dtype == theirs.dtype
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config == theirs.generation_config
    with torch.no_grad():
        logits = [model(IDS, return_dict=True).logits for model in (ours, theirs)]
    assert logits[0].dtype == logits[1].dtype
    assert torch.equal(*logits)
    tokens = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        tokens.append(model.generate(IDS, max_new_tokens=8, eos_token_id=None))
    assert torch.equal(*tokens)


def arguments_of_transformers() -> set[str]:
    """Find the names that transformers' loaders take: in their signatures, and popped in their bodies."""
    names: set[str] = set()
    for loader in (PreTrainedModel.from_pretrained, _BaseAutoModelClass.from_pretrained):
        source = inspect.getsource(loader)
        names |= inspect.signature(loader).parameters.keys()
        names |= set(re.findall(r"kwargs\.(?:pop|get)\(\s*\"(\w+)\"", source))
        for names_in_list in re.findall(r"(?:for name in|hub_kwargs_names =) \[(.*?)\]", source, re.DOTALL):
            names |= set(re.findall(r"\"(\w+)\"", names_in_list))
    return names - {"model_args", "kwargs", "cls"}


def test_each_argument_is_accounted_for() -> None:
    found = arguments_of_transformers()
    assert {"device_map", "subfolder", "low_cpu_mem_usage", "code_revision", "config"} <= found  # it does look
    named = inspect.signature(ll.ShardedModel.from_pretrained).parameters.keys()
    taken = {"force_download", "generation_config", "proxies", "torch_dtype"}
    assert found - named - taken <= own._REMEDIES.keys() | set(own._WITHOUT_EFFECT)
    assert own._REMEDIES.keys() | set(own._WITHOUT_EFFECT) <= found
    assert not named & own._REMEDIES.keys()


@pytest.mark.parametrize("name", sorted(own._REMEDIES))
def test_refused_by_name(place: Place, llama: Path, name: str) -> None:
    values = {"use_safetensors": False, "disable_mmap": False, "device_map": 0}
    with pytest.raises(ll.UnsupportedOperationError, match=f"^{name}=.* is not supported .*: \\w"):
        place(llama, SPANS, **{name: values.get(name, "something")})


def test_what_asks_for_nothing_else_is_taken(place: Place, llama: Path) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(PreTrainedModel.from_pretrained).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    asked = dict.fromkeys(own._REMEDIES) | dict.fromkeys(own._WITHOUT_EFFECT, True) | defaults
    asked |= {"adapter_name": "default", "adapter_kwargs": {}, "use_safetensors": True, "disable_mmap": True}
    asked |= {
        "proxies": None,
        "torch_dtype": None,
        "generation_config": None,
        "trust_remote_code": True,
        "token": False,
    }
    asked |= {"local_files_only": True, "cache_dir": str(llama / "nowhere"), "attn_implementation": None}
    assert_same_model(place(llama, SPANS, **asked), reference(llama))


LOADS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": torch.bfloat16},
    "auto": {"dtype": "auto"},
    "older name of dtype": {"torch_dtype": torch.bfloat16},
    "dtype and its older name": {"dtype": torch.float16, "torch_dtype": torch.bfloat16},
    "auto and its older name": {"dtype": "auto", "torch_dtype": torch.bfloat16},
    "eager attention": {"attn_implementation": "eager"},
    "sdpa attention": {"attn_implementation": "sdpa"},
    "rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "fewer layers": {"num_hidden_layers": 3},
    "no KV": {"use_cache": False},
    "special tokens": {"eos_token_id": 7, "pad_token_id": 9},
    "generation config": {"generation_config": GenerationConfig(do_sample=True, top_k=3, eos_token_id=5)},
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.filterwarnings("ignore:.*torch_dtype")
def test_loaded_as_transformers_loads(place: Place, llama: Path, load: str) -> None:
    num_layers = LOADS[load].get("num_hidden_layers", 4)
    ours = place(llama, [("a", 0, 2), ("b", 2, num_layers)], **LOADS[load])
    theirs = reference(llama, **LOADS[load])
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert_same_model(ours, theirs)


@pytest.mark.parametrize(
    "change", [{}, {"sliding_window": 3}, {"attn_implementation": "eager"}, {"hidden_act": "gelu"}]
)
def test_config_of_the_users(place: Place, mistral: Path, change: dict[str, Any]) -> None:
    config = AutoConfig.from_pretrained(mistral, **change)
    before = config.to_dict()
    ours = place(mistral, SPANS, config=config)
    theirs = reference(mistral, config=AutoConfig.from_pretrained(mistral, **change))
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert_same_model(ours, theirs)
    assert config.to_dict() == before


def test_config_of_a_loaded_model(place: Place, llama: Path, tmp_path: Path) -> None:
    """It says which implementations were chosen, of experts too, where there are none."""
    for folder in (llama, save_tiny("mixtral", torch.float32, tmp_path)):
        theirs = reference(folder)
        assert_same_model(place(folder, SPANS, config=theirs.config), theirs)


def test_experts_of_another_kind_in_the_users_config(place: Place, tmp_path: Path) -> None:
    folder = save_tiny("mixtral", torch.float32, tmp_path)
    with pytest.raises(ll.UnsupportedOperationError, match="experts_implementation='eager'"):
        place(folder, SPANS, config=AutoConfig.from_pretrained(folder, experts_implementation="eager"))


def test_config_in_another_place(place: Place, llama: Path, tmp_path: Path) -> None:
    text = json.loads((llama / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(text))
    theirs = LlamaForCausalLM.from_pretrained(llama, config=str(tmp_path))  # AutoModelForCausalLM ignores it
    with torch.no_grad():
        ours = place(llama, SPANS, config=str(tmp_path))(IDS).logits
        assert torch.equal(ours, theirs(IDS).logits)


def test_a_subfolder_of_several_files(place: Place, tmp_path: Path) -> None:
    save_tiny("llama-tied", torch.bfloat16, tmp_path / "inner", max_shard_size="20KB")
    assert len(list((tmp_path / "inner").glob("*.safetensors"))) > 2
    (tmp_path / "inner" / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": 90}')
    ours = place(tmp_path, SPANS, subfolder="inner")
    assert ours.generation_config.max_new_tokens == 3
    theirs = reference(tmp_path, subfolder="inner")
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert_same_model(ours, theirs)


def test_dummy_weights_are_the_same_however_they_are_cut(place: Place, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    cuts = ([("a", 0, 4)], [("b", 0, 1), ("a", 1, 4)], [("a", 0, 2), ("b", 2, 3), ("c", 3, 4)])

    def logits(spans: list[tuple[str, int, int]], path: object = tmp_path, **arguments: Any) -> torch.Tensor:
        return place(path, spans, load_format="dummy", **arguments)(IDS).logits

    first = logits(cuts[0], seed=5)
    assert first.isfinite().all()
    assert first.std() > 0
    for spans in cuts[1:]:
        assert torch.equal(logits(spans, seed=5), first)
    config = AutoConfig.from_pretrained(llama)
    assert torch.equal(logits(cuts[1], "nowhere", config=config, seed=5), first)
    assert not torch.equal(logits(cuts[1], seed=6), first)
    assert torch.equal(logits(cuts[1]), logits(cuts[2], seed=0))


def test_outputs_of_layers_that_the_config_asks_for(place: Place, llama: Path) -> None:
    for name in ("attentions", "hidden_states"):
        arguments = {f"output_{name}": True, "attn_implementation": "eager"}
        ours, theirs = (model(IDS)[name] for model in (place(llama, SPANS, **arguments), reference(llama, **arguments)))
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs))


def test_tuples_that_the_config_asks_for(place: Place, llama: Path) -> None:
    model = place(llama, SPANS, return_dict=False)  # of which transformers' Llama makes an error
    assert model.config.return_dict is False
    logits, past = model(IDS)
    assert torch.equal(model(IDS, return_dict=True).logits, logits)
    assert past.get_seq_length() == IDS.shape[1]


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "unknown argument 'colour'": (ll.ArgumentError, {"colour": "red"}),
    "unknown argument 'rope_theta'": (ll.ArgumentError, {"rope_theta": 77.0}),  # now in rope_parameters
    "unknown argument 'hidden_dropout'": (ll.ArgumentError, {"config": "an object", "hidden_dropout": 0.1}),
    "generation_config is a dict": (ll.ArgumentError, {"generation_config": {"do_sample": True}}),
    "dtype='floaty'": (ll.ArgumentError, {"dtype": "floaty"}),
    "dtype=torch.int8": (ll.ArgumentError, {"dtype": torch.int8}),
    "attn_implementation='flash_attention_2' can't be used": (
        ll.ArgumentError,
        {"attn_implementation": "flash_attention_2"},
    ),
    "attn_implementation='magic' can't be used": (ll.ArgumentError, {"attn_implementation": "magic"}),
    "attn_implementation='some/kernel' is not": (
        ll.UnsupportedOperationError,
        {"attn_implementation": "some/kernel"},
    ),
    "attn_implementation='paged|sdpa' is not": (
        ll.UnsupportedOperationError,
        {"attn_implementation": "paged|sdpa"},
    ),
    "attn_implementation={'': 'eager'} is not": (
        ll.UnsupportedOperationError,
        {"attn_implementation": {"": "eager"}},
    ),
    "attn_implementation=3 must": (ll.ArgumentError, {"attn_implementation": 3}),
    "LlamaForCausalLM can't be built from its config: KeyError: 'magic'": (ll.CheckpointError, {"hidden_act": "magic"}),
    "LlamaForCausalLM can't be built from its config: StrictData": (ll.CheckpointError, {"hidden_size": 33}),
}


@pytest.mark.parametrize("path", [None, "", 7, AutoConfig])
def test_what_is_no_checkpoint(path: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=r"^the model to load is .*: pass the folder of a checkpoint"):
        ll.ShardedModel.from_pretrained(path)


@pytest.mark.parametrize("match", BAD)
def test_what_can_not_be_used(place: Place, llama: Path, match: str) -> None:
    error, arguments = BAD[match]
    if "config" in arguments:
        arguments = {**arguments, "config": AutoConfig.from_pretrained(llama)}
    with pytest.raises(error, match=f"^{re.escape(match)}"):
        place(llama, SPANS, **arguments)


def test_custom_code_that_is_not_there_is_refused_and_without_trust_passed_over(
    place: Place, llama: Path, tmp_path: Path
) -> None:
    text = json.loads((llama / "config.json").read_text())
    text["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ll.CheckpointError, match=r"the code modeling_own\.py of the checkpoint"):
        place(tmp_path, SPANS, load_format="dummy", trust_remote_code=True)
    assert place(tmp_path, SPANS, load_format="dummy").dtype == torch.float32  # as AutoModelForCausalLM without trust

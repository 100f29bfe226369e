"""Bad input is a clear error of the library's own, raised at once, and nothing is left of the attempt."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProphetNetConfig,
)

import lingualinked as ll
from lingualinked.cluster.workers.inspection import inspect_workers
from waiting import num_sessions, wait_until

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])


@pytest.fixture(autouse=True)
def nothing_is_hosted_that_was_not(shared_cluster: ll.Cluster, sharded: Any) -> Iterator[None]:
    """The attempt leaves neither a stage nor a session on the shared workers, and they still work."""
    before = hosted(shared_cluster)
    yield
    wait_until(lambda: hosted(shared_cluster) == before)
    assert sharded(IDS).logits.shape == (1, 5, 128)
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def hosted(cluster: ll.Cluster) -> list[tuple[int, int]]:
    names = [device.name for device in cluster.devices]
    reports = inspect_workers(cluster._engine, names, 30)
    return [(stage.model, stage.snapshot.start) for report in reports for stage in report.stages]


Load = Callable[..., Any]


@pytest.fixture
def load(shared_cluster: ll.Cluster) -> Load:
    def from_pretrained(path: str | Path, **arguments: Any) -> Any:
        return ll.ShardedModel.from_pretrained(path, cluster=shared_cluster, progress=False, **arguments)

    return from_pretrained


@pytest.fixture
def checkpoint(tiny_llama: str, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "checkpoint"))


# --- checkpoints


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such/folder", "no-such/model", "no such model"])
def test_a_path_that_is_not_there(load: Load, path: str) -> None:
    with pytest.raises(ll.CheckpointError, match=path):
        load(path)


def test_nothing_is_left_of_a_cluster_made_for_a_model_that_is_not_there() -> None:
    with pytest.raises(ll.CheckpointError, match="/no/such/folder"):
        ll.ShardedModel.from_pretrained("/no/such/folder", devices=2)


@pytest.mark.parametrize("config", ["", "{", "[]", '{"model_type": "no-such-type"}', "{}"])
def test_a_config_that_is_none(load: Load, checkpoint: Path, config: str) -> None:
    (checkpoint / "config.json").write_text(config)
    with pytest.raises(ll.LingualinkedError, match=r"config\.json"):
        load(checkpoint)


def truncated(data: bytes) -> bytes:
    return data[:-100]


def headless(data: bytes) -> bytes:
    return data[:20]


def with_another_header(data: bytes) -> bytes:
    return data[:8] + b"x" * 40 + data[48:]


def with_a_huge_header(data: bytes) -> bytes:
    return (2**62).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize("damage", [truncated, headless, with_another_header, with_a_huge_header, lambda data: b""])
def test_a_damaged_safetensors_file(load: Load, checkpoint: Path, damage: Callable[[bytes], bytes]) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ll.CheckpointError, match=r"model\.safetensors"):
        load(checkpoint)


def test_a_safetensors_file_cut_short_after_it_was_looked_at(load: Load, checkpoint: Path, sharded: Any) -> None:
    """What only a worker notices comes back as the same error, with the worker's own as its cause."""
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.sharded.loading.arguments import LoadArguments
    from lingualinked.sharded.loading.describing import describe
    from lingualinked.sharded.loading.placing import find_or_fit_plan

    arguments = LoadArguments(path=str(checkpoint), cluster=sharded.cluster, plan="even", progress=False)
    described = describe(arguments)
    file = checkpoint / "model.safetensors"
    file.write_bytes(truncated(file.read_bytes()))
    pipeline = Pipeline(
        sharded.cluster, described.spec, find_or_fit_plan(described, arguments), max_kv_tokens=None, timeout_s=60
    )
    with pytest.raises(ll.CheckpointError, match=r"device '[abcd]': .*model\.safetensors") as caught:
        pipeline.load(lambda device, num_bytes: None)
    assert isinstance(caught.value.__cause__, ll.WorkerError)
    assert "Remote traceback" in str(caught.value.__cause__)
    pipeline.unload()


def in_shards(checkpoint: Path) -> list[Path]:
    """Rewrite a checkpoint as one of several files."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    halves = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for shard, held in halves.items():
        save_file({name: tensors[name] for name in held}, checkpoint / shard)
    weight_map = {name: shard for shard, held in halves.items() for name in held}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    file.unlink()
    return [checkpoint / shard for shard in halves]


def test_a_shard_that_is_missing_from_the_folder(load: Load, checkpoint: Path) -> None:
    _, second = in_shards(checkpoint)
    second.unlink()
    with pytest.raises(ll.CheckpointError, match=r"second\.safetensors.*is missing"):
        load(checkpoint)


def test_a_shard_that_is_damaged(load: Load, checkpoint: Path) -> None:
    first, _ = in_shards(checkpoint)
    first.write_bytes(truncated(first.read_bytes()))
    with pytest.raises(ll.CheckpointError, match=r"first\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("index", ["", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../other.safetensors"}}'])
def test_an_index_that_is_none(load: Load, checkpoint: Path, index: str) -> None:
    in_shards(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ll.CheckpointError, match=r"index\.json"):
        load(checkpoint)


def test_a_tensor_that_is_missing(load: Load, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ll.CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load(checkpoint)


def test_weights_of_another_shape_than_the_config_says(load: Load, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ll.CheckpointError, match="of different models"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_git_lfs_has_not_fetched(load: Load, checkpoint: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"
    (checkpoint / name).write_text(pointer)
    with pytest.raises(ll.CheckpointError, match=rf"git-lfs pointers in place of {name}: run 'git lfs pull'"):
        load(checkpoint)


def test_an_adapter(load: Load, checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ll.CheckpointError, match=r"has no adapter_model.safetensors: copy the whole adapter again"):
        load(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ll.CheckpointError, match=r"adapter_config.json is not the configuration of an adapter"):
        load(checkpoint)


def test_a_quantised_checkpoint(load: Load, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (checkpoint / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ll.CheckpointError, match="quanti"):
        load(checkpoint)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SMALL, architectures=["BertForMaskedLM"]),
        BertConfig(**SMALL, architectures=["BertModel"]),
        ProphetNetConfig(),
    ],
    ids=["masked", "bare encoder", "encoder-decoder"],
)
def test_a_model_that_is_no_decoder(load: Load, config: PreTrainedConfig) -> None:
    with pytest.raises(ll.UncuttableModelError, match="can't be cut") as caught:
        load("dummy", config=config, load_format="dummy")
    assert caught.value.name
    assert caught.value.reason


# --- placements


def test_more_stages_than_layers(load: Load) -> None:
    with pytest.raises(ll.InfeasiblePlanError, match=r"4 stages for 2 layers.*at most 2 devices"):
        load("dummy", config=LlamaConfig(**SMALL), load_format="dummy", plan="even")


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([("a", 0, 3)], "places 3 layers, the model has 4"),
        ([("a", 0, 2), ("z", 2, 4)], "device 'z'"),
    ],
)
def test_a_plan_for_something_else(load: Load, tiny_llama: str, spans: list[tuple[str, int, int]], words: str) -> None:
    with pytest.raises(ll.InfeasiblePlanError, match=words):
        load(tiny_llama, plan=ll.Plan.from_spans(spans))


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "float13"}, "float13"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": torch.int64}, "int64"),
        ({"torch_dtype": "nonsense"}, "nonsense"),
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"load_format": "pickle"}, "load_format='pickle'"),
        ({"max_kv_tokens": 0}, "max_kv_tokens=0"),
        ({"timeout_s": -1}, "timeout_s=-1"),
        ({"devices": 2}, "not both"),
        ({"attn_implementation": "no_such_attention"}, "no_such_attention"),
    ],
)
def test_an_argument_that_can_not_be_used(load: Load, tiny_llama: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ll.ArgumentError, match=words):
        load(tiny_llama, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"quantization_config": {"load_in_8bit": True}}, {"device_map": "auto"}, {"tp_plan": "auto"}, {"state_dict": {}}],
)
def test_an_argument_of_transformers_that_has_no_counterpart(
    load: Load, tiny_llama: str, arguments: dict[str, Any]
) -> None:
    (name,) = arguments
    with pytest.raises(ll.UnsupportedOperationError, match=name):
        load(tiny_llama, **arguments)


# --- inputs


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.empty(0, 3, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.tensor([[1, 128]])}, "from 1 to 128, but the vocabulary from 0 to 127"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "from -1 to 5"),
        ({"input_ids": torch.tensor([[0.5]])}, "integers"),
        ({"input_ids": torch.tensor([1, 2])}, "dimensions"),
        ({"input_ids": [[1, 2]]}, "tensor"),
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 5, 32)}, "input_ids or inputs_embeds"),
        ({"input_ids": IDS, "no_such_argument": 1}, "no_such_argument"),
        ({"input_ids": IDS.to_sparse()}, "layout torch.sparse_coo: give a dense tensor"),
        ({"input_ids": IDS, "labels": IDS.float()}, "labels must be integers"),
    ],
)
def test_inputs_that_can_not_be_used(sharded: Any, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(ll.ArgumentError, match=words):
        sharded(**inputs)


@pytest.mark.parametrize(
    "ids", [torch.empty(1, 0, dtype=torch.long), torch.tensor([[1, 128]]), torch.tensor([[-1, 5]])]
)
def test_ids_that_nothing_can_be_generated_from(sharded: Any, ids: torch.Tensor) -> None:
    with pytest.raises(ll.ArgumentError, match="input_ids"):
        sharded.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("name", ["input_ids", "inputs", "attention_mask", "position_ids", "inputs_embeds"])
@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, lambda ids: ids.to("meta")])
def test_a_prompt_that_is_no_tensor_with_data(
    sharded: Any, name: str, convert: Callable[[torch.Tensor], object]
) -> None:
    inputs = {"input_ids": IDS} if name in ("attention_mask", "position_ids") else {}
    with pytest.raises(ll.ArgumentError, match=r"give a tensor|is on the meta device"):
        sharded.generate(**inputs, **{name: convert(IDS)}, max_new_tokens=2)


def test_a_prompt_in_one_dimension(sharded: Any) -> None:
    with pytest.raises(ll.ArgumentError, match="must have 2 dimensions"):
        sharded.generate(IDS[0], max_new_tokens=2)
    with pytest.raises(ll.ArgumentError, match=r"(attention_mask|position_ids) of shape"):
        sharded.generate(IDS, attention_mask=torch.ones(1, 4), max_new_tokens=2)


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"past_key_values": DynamicCache(offloading=False, config=GPT2Config())}, "DynamicCache"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(sharded: Any, inputs: dict[str, Any], name: str) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=name):
        sharded(IDS, **inputs)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=8, vocab_size=64),
        OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
            vocab_size=64,
            word_embed_proj_dim=32,
            max_position_embeddings=8,
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_a_text_longer_than_the_learned_positions(load: Load, config: PreTrainedConfig) -> None:
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 2)])
    with load("dummy", config=config, load_format="dummy", plan=plan) as model:
        past = model(torch.ones(1, 8, dtype=torch.long)).past_key_values
        for too_long in ({}, {"past_key_values": past}):
            ids = torch.ones(1, 1 if too_long else 9, dtype=torch.long)
            with pytest.raises(ll.ArgumentError, match="9 tokens exceed the 8 positions"):
                model(ids, **too_long)
        with pytest.raises(ll.ArgumentError, match="the 8 positions"):
            model.generate(torch.ones(1, 6, dtype=torch.long), max_new_tokens=9, do_sample=False, eos_token_id=None)


def test_a_text_longer_than_rotary_positions_is_what_transformers_makes_of_it(
    sharded: Any, unsharded: PreTrainedModel
) -> None:
    ids = torch.arange(1, 601).remainder(120).unsqueeze(0)
    assert ids.shape[1] > unsharded.config.max_position_embeddings
    with torch.no_grad():
        assert torch.equal(sharded(ids, logits_to_keep=3).logits, unsharded(ids, logits_to_keep=3).logits)


def test_a_worker_that_raises_says_where_and_why_and_the_model_goes_on(sharded: Any) -> None:
    past = sharded(IDS).past_key_values
    mask = torch.ones(1, 1, 1, 1, dtype=torch.long)  # attention takes no integers
    with pytest.raises(ll.WorkerError, match="worker on device 'a' raised") as caught:
        sharded(IDS, attention_mask=mask)
    assert caught.value.device == "a"
    assert "Remote traceback (device 'a')" in str(caught.value)
    assert 'File "' in caught.value.remote_traceback
    assert caught.value.remote_traceback.rstrip().endswith(caught.value.cause.splitlines()[-1])
    with pytest.raises(ll.WorkerError):
        sharded(IDS, attention_mask=mask, past_key_values=past)
    with pytest.raises(ll.ClosedError, match="this session has ended with WorkerError"):
        sharded(IDS, past_key_values=past)
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_a_later_stage_that_raises_names_its_own_device(sharded: Any) -> None:
    with pytest.raises(ll.WorkerError, match="worker on device 'c' raised"):
        sharded(IDS, logits_to_keep=torch.tensor([7]))
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_indices_of_a_wrong_type_do_not_wait_for_an_answer(sharded: Any) -> None:
    with pytest.raises(ll.LingualinkedError):
        sharded(IDS, logits_to_keep=1.5)


# --- after close


def test_a_closed_model(load: Load, tiny_llama: str) -> None:
    model = load(tiny_llama)
    past = model(IDS).past_key_values
    before = model.telemetry
    model(IDS)
    model.close()
    model.close()
    after = model.telemetry  # what was known last
    assert [stage.num_steps for stage in after.stages] == [stage.num_steps + 1 for stage in before.stages]
    assert len(after.history.steps) == 2
    for use in (
        lambda: model(IDS),
        lambda: model(IDS[:, :1], past_key_values=past),
        lambda: model.generate(IDS, max_new_tokens=2),
    ):
        with pytest.raises(ll.ClosedError, match="closed"):
            use()
    past.end()


def test_a_closed_cluster(tiny_llama: str) -> None:
    cluster = ll.Cluster(1)
    model = ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan="even", progress=False)
    before = model.telemetry
    cluster.close()
    assert model.telemetry.stages == before.stages
    with pytest.raises(ll.ClosedError, match="closed"):
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, progress=False)


def test_closing_a_model_ends_what_runs_on_it_and_nothing_else(load: Load, tiny_llama: str, sharded: Any) -> None:
    model = load(tiny_llama)
    running, outcome = threading.Event(), []

    def started(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        running.set()
        return torch.zeros(len(ids), dtype=torch.bool)

    def generate() -> None:
        try:
            model.generate(IDS, max_new_tokens=10**6, do_sample=False, eos_token_id=None, stopping_criteria=[started])
        except ll.LingualinkedError as error:
            outcome.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    assert running.wait(30)
    other = sharded(IDS).past_key_values
    model.close()
    thread.join(30)
    assert not thread.is_alive()
    (error,) = outcome
    assert isinstance(error, ll.ClosedError)
    sharded(IDS[:, :1], past_key_values=other)

"""Real workers for the tests: one shared cluster, and tiny random checkpoints on disk.

Knows how to make a checkpoint and its unsharded reference; nothing of what is compared.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jupyter_core.utils import ensure_event_loop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import lingualinked as ll
from accelerators import device, on_accelerator
from families import VOCABULARY
from lingualinked import disk_cache
from lingualinked.cluster.measuring import profiling
from lingualinked.processes.fork_server import fork_servers
from lingualinked.sharded.generating import random_loans


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements are trusted, whatever else this machine computes while tests run, so few repeats will do."""
    monkeypatch.setattr(profiling, "find_doubt", lambda *_: "")
    monkeypatch.setattr(profiling, "_NUM_PREFILLS", 2)
    monkeypatch.setattr(profiling, "_NUM_DECODES", 2)


@pytest.fixture(autouse=True)
def no_loan_outlives_its_loop() -> Iterator[None]:
    """Fail a test that leaves the random numbers on loan: no later run of this process could sample on its stages."""
    yield
    assert not random_loans._loans


@pytest.fixture(scope="session", autouse=True)
def shared_fork_server(nothing_outlives_the_session: None) -> Iterator[None]:
    """What forks the workers of all clusters is kept between them: starting it takes longer than most tests."""
    server = fork_servers.acquire(())
    yield
    fork_servers.release(server)


@pytest.fixture(scope="session")
def shared_cluster(shared_fork_server: None) -> Iterator[ll.Cluster]:
    """Four workers with one thread each, for every test that does not harm them."""
    with ll.Cluster([device(name) for name in "abcd"]) as cluster:
        cluster.workers()  # an answer of each: connections stand both ways, and no test is taken to leave them
        yield cluster


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for profiles and plans: not by the environment, with which workers need another fork server."""
    monkeypatch.setattr(disk_cache, "cache_folder", lambda: tmp_path / "lingualinked")
    return tmp_path / "lingualinked"


@pytest.fixture
def own_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of this test share no fork server with others: they start workers in another environment."""
    monkeypatch.setenv("LINGUALINKED_TEST_FORK_SERVER", uuid.uuid4().hex)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of 4 layers, float32, with an end-of-text token that greedy decoding may meet."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_random(config, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny Llama: as many tokens, of letters and a few words."""
    return make_tokenizer(128)


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of fewer tokens, for the tiny models of families.py."""
    return make_tokenizer(VOCABULARY)


@pytest.fixture(scope="session")
def sharded(shared_cluster: ll.Cluster, tiny_llama: str) -> Iterator[ll.ShardedModel]:
    """The tiny Llama over three of the shared workers; for tests that leave it as it was."""
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model


@pytest.fixture(scope="session")
def unsharded(tiny_llama: str) -> PreTrainedModel:
    return load_unsharded(tiny_llama)


@pytest.fixture
def place(shared_cluster: ll.Cluster) -> Iterator[Callable[..., ll.ShardedModel]]:
    """Load a checkpoint on the shared workers in so many stages; it is unloaded after the test."""
    models: list[ll.ShardedModel] = []

    def place_model(path: str, spans: list[tuple[str, int, int]], **arguments: object) -> ll.ShardedModel:
        plan = ll.Plan.from_spans(spans)
        model = ll.ShardedModel.from_pretrained(path, cluster=shared_cluster, plan=plan, progress=False, **arguments)
        models.append(model)
        return model

    yield place_model
    for model in models:
        model.close()


def make_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on a few words."""
    words = (
        "the quick brown fox jumps over the lazy dog, while seven wizards make toxic brew for the evil queen "
        "and jack packs my box with five dozen jugs of liquor; 0 1 2 3 4 5 6 7 8 9"
    ).split()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=num_tokens, special_tokens=list(special.values()), show_progress=False)
    model.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, padding_side="left", **special)
    assert len(tokenizer) == num_tokens
    return tokenizer


@pytest.fixture(scope="session")
def matplotlib_fonts() -> None:
    """The fonts that matplotlib has drawn with stay open; so they are before a test begins."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title("text")
    figure.savefig(io.BytesIO())


@pytest.fixture(scope="session")
def jupyter_event_loop() -> None:
    """The event loop that Jupyter's client makes for itself stays; so it is there before a test begins."""
    ensure_event_loop()


def save_random(config: PreTrainedConfig, folder: Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Write a checkpoint with random weights, large enough for outputs to differ from token to token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def load_unsharded(path: str, **arguments: object) -> PreTrainedModel:
    """Load the reference, its weights copied: mapped ones are not aligned, and that alone can change the last bits."""
    model = AutoModelForCausalLM.from_pretrained(path, **arguments).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return on_accelerator(model)

"""Models to experiment on: a tiny one of each family, uncut and in three stages, shared by all tests of a process.

An experiment is a function of a model, as its authors would write it with torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from accelerators import device
from both_models import BothModels
from families import VOCABULARY, reference, save_tiny
from lingualinked.processes.fork_server import fork_servers

SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]


@pytest.fixture(scope="session")
def three_workers(nothing_outlives_the_session: None) -> Iterator[ll.Cluster]:
    """Workers for every experiment; what forks them is kept for other clusters of this process."""
    server = fork_servers.acquire(())
    with ll.Cluster([device(name) for name in "abc"]) as cluster:
        cluster.workers()  # an answer of each: connections stand both ways, and no test is taken to leave them
        yield cluster
    fork_servers.release(server)


def both_models(name: str, family: str = "", *, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """Make the fixture of one checkpoint, of which no test may change anything for good."""

    @pytest.fixture(scope="session", name=name)
    def load(three_workers: ll.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BothModels]:
        folder = save_tiny(family or name, dtype, tmp_path_factory.mktemp(name))
        with ll.ShardedModel.from_pretrained(
            str(folder), cluster=three_workers, plan=ll.Plan.from_spans(SPANS), progress=False, **arguments
        ) as sharded:
            yield BothModels(sharded, reference(folder, **arguments))

    return load


bloom = both_models("bloom")
gemma2 = both_models("gemma2", dtype=torch.bfloat16)
gpt2 = both_models("gpt2", attn_implementation="eager")  # whose attention weights are outputs
llama = both_models("llama")
mixtral = both_models("mixtral")
qwen3 = both_models("qwen3", attn_implementation="eager")


@pytest.fixture
def prompts() -> Tensor:
    """Eight prompts of nine random tokens."""
    return torch.randint(3, VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(1))

from __future__ import annotations

import pytest
import torch

from lingualinked.errors import ArgumentError
from lingualinked.model.stages.autograd_graph import AutogradGraph
from lingualinked.worker.hooks import kept_graphs
from lingualinked.worker.hooks.kept_graphs import KeptGraphs


def graph_of(num_bytes: int) -> AutogradGraph:
    """The graph of a square, which keeps its input."""
    graph = AutogradGraph((True,))
    [states] = graph.begin((torch.ones(num_bytes // 4),))
    graph.end((states.square(),), [])
    assert graph.num_bytes == num_bytes
    return graph


def test_graphs_take_no_more_memory_than_they_leave_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_graphs, "spare_bytes", lambda _: 1000)
    kept = KeptGraphs("cpu")
    kept.keep((1, 0), graph_of(400))
    kept.keep((2, 0), graph_of(400))
    with pytest.raises(MemoryError, match=r"would hold 1,200 bytes, of which this step adds 400, and only 1,000"):
        kept.keep((3, 0), graph_of(400))
    kept.free((1, 0))
    kept.free((1, 0))
    kept.keep((3, 0), graph_of(400))
    assert kept.num_bytes == 800
    with pytest.raises(ArgumentError, match="has been freed"):
        kept.find((1, 0))


def test_a_pass_that_does_not_retain_a_graph_frees_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_graphs, "spare_bytes", lambda _: 1000)
    kept = KeptGraphs("cpu")
    graph = graph_of(400)
    kept.keep((1, 0), graph)
    for keeps_graph, num_bytes in ((True, 400), (False, 0)):
        graph.run(None, (torch.ones(100),), keeps_graph=keeps_graph, reach_tap=lambda *_: ((), ()))
        assert kept.num_bytes == num_bytes


def test_graphs_without_gradients_are_not_kept() -> None:
    kept = KeptGraphs("cpu")
    graph = AutogradGraph((False,))
    graph.end(graph.begin((torch.ones(2),)), [])
    kept.keep((1, 0), graph)
    kept.keep((1, 1), None)
    for key in ((1, 0), (1, 1)):
        with pytest.raises(ArgumentError):
            kept.find(key)

"""The autograd graphs that steps have left in one stage, until they are freed.

Knows graphs, the message of a step and the memory that is free; not who sends it.
"""

from __future__ import annotations

from lingualinked.errors import ArgumentError
from lingualinked.model.stages.autograd_graph import AutogradGraph
from lingualinked.protocol.steps import Step
from lingualinked.worker.process.limits import spare_bytes

GraphKey = tuple[int, int]
"""A step's session and number."""


def new_graph(step: Step) -> AutogradGraph | None:
    """Return the graph of a step that is still to run; None if nobody will ask for gradients."""
    if step.requires_grad is None:
        return None
    is_input_known = step.stage == 0 or step.ends_at_tap[-1:] == (True,)
    return AutogradGraph(step.requires_grad, is_input_known=is_input_known)


class KeptGraphs:
    """The graphs of one stage on an accelerator."""

    def __init__(self, accelerator: str) -> None:
        self._accelerator = accelerator
        self._graphs: dict[GraphKey, AutogradGraph] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes that all graphs keep."""
        return sum(each.num_bytes for each in self._graphs.values())

    def keep(self, key: GraphKey, graph: AutogradGraph | None) -> None:
        """Keep the graph of a step unless it is empty; raise MemoryError if all would exceed the memory that is still free."""
        if graph is None or graph.is_empty:
            return
        held, spare = self.num_bytes + graph.num_bytes, spare_bytes(self._accelerator)
        if held > spare:
            raise MemoryError(
                f"the autograd graphs of this stage would hold {held:,} bytes, of which this step adds {graph.num_bytes:,}, and "
                f"only {spare:,} more are free: use fewer rows or tokens, call backward() after each step, or delete the "
                "outputs of earlier steps"
            )
        self._graphs[key] = graph

    def find(self, key: GraphKey) -> AutogradGraph:
        """Return the graph of a step; raise ArgumentError if it has been freed."""
        graph = self._graphs.get(key)
        if graph is None:
            raise ArgumentError("the graph of this step has been freed: run the forward pass again")
        return graph

    def free(self, key: GraphKey) -> None:
        """Free the graph of a step, if it is there."""
        self._graphs.pop(key, None)

"""The cluster and the model of a setup, made when a test first needs them.

Knows no pytest. A cluster that a test has harmed is replaced before the next test.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from lingualinked.device import Device
from lingualinked.sample import sample_model
from lingualinked.sharded.model import ShardedModel
from lingualinked.testing.faulty_cluster import FaultyCluster
from lingualinked.testing.setup import Setup


class Provider:
    """Owns one cluster and one model on it; a context manager."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._cluster: FaultyCluster | None = None
        self._model: ShardedModel | None = None

    @property
    def cluster(self) -> FaultyCluster:
        """The cluster, all of whose workers are ready."""
        if self._cluster is not None and (self._cluster.closed or self._cluster.is_harmed):
            self.close()
        if self._cluster is None:
            devices = self._setup.devices
            if isinstance(devices, int):
                devices = tuple(Device(name=f"worker-{index}", threads=1) for index in range(devices))
            self._cluster = FaultyCluster(devices, **self._setup.cluster_arguments)
            self._cluster.wait()
        return self._cluster

    @property
    def model(self) -> ShardedModel:
        """The model."""
        cluster = self.cluster
        if self._model is not None and self._model._pipeline.closed:  # noqa: SLF001 - a test has closed it
            self._model = None
        if self._model is None:
            arguments: dict[str, Any] = {"plan": "even", "progress": False, **self._setup.model_arguments}
            path = arguments.pop("model", None) or sample_model()
            self._model = ShardedModel.from_pretrained(path, cluster=cluster, **arguments)
        return self._model

    def close(self) -> None:
        """End the workers, with the model."""
        self._model = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

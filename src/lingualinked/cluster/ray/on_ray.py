"""How a cluster is made on a running Ray cluster.

Knows what a user asks for; where devices are placed is `lingualinked.cluster.ray.ray_placement`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from lingualinked.checks import check_positive
from lingualinked.transport.wire.message_limits import DEFAULT_MAX_FRAME_BYTES

if TYPE_CHECKING:
    from lingualinked.cluster.ray.ray_placement import RayPlacement, Strategy
    from lingualinked.cluster.workers.cluster_workers import ClusterWorkers

_PLACING_S = 60.0


class OnRay:
    """A cluster's way onto the nodes of a Ray cluster."""

    _workers: ClusterWorkers

    if TYPE_CHECKING:

        def __init__(self, devices: Any, **options: Any) -> None: ...

    @classmethod
    def on_ray(
        cls,
        num_devices: int,
        *,
        resources: Mapping[str, Any] | None = None,
        strategy: Strategy = "SPREAD",
        runtime_env: Mapping[str, Any] | None = None,
        advertise: str | None = None,
        timeout_s: float | None = None,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        shared_memory: bool = True,
    ) -> Self:
        """Make a cluster whose workers Ray places on the nodes of a running Ray cluster.

        Each device is a bundle of one placement group, and an actor in it that runs a daemon for this cluster alone. Ray
        frees them after `close`, and when this process leaves Ray or ends. Tensors travel as in any cluster, not
        through Ray. This process is connected to Ray already (``ray.init``), or is now to the cluster that ``RAY_ADDRESS``
        names or that runs here.

        Parameters
        ----------
        num_devices : int
            How many devices to place.
        resources : mapping of str to float, optional
            What each device gets, by Ray's names: ``"CPU"``, the threads that it computes with (1 unless given), ``"GPU"``, 0 or
            1, ``"memory"``, in bytes or with a unit (``"16GiB"``), and resources of the user's own. Without memory it has
            what its node has, divided among the devices there.
        strategy : str
            Of the placement group: ``"SPREAD"``, ``"PACK"``, ``"STRICT_SPREAD"`` or ``"STRICT_PACK"``.
        runtime_env : mapping, optional
            Of the actors, as Ray takes it, such as for nodes without lingualinked.
        advertise, max_frame_bytes, shared_memory
            As in `Cluster`.
        timeout_s : float or None
            As in `Cluster`; also the seconds that placing and starting may take each, 60 unless given.

        Returns
        -------
        Cluster
            With devices that are named after their nodes and numbered; its `ray` restarts those that die.

        Raises
        ------
        ArgumentError
            If a value can't be used, Ray is not installed, or no Ray cluster runs.
        ResourceError
            If Ray can't place the devices, or a daemon does not start on a node; the message says what the nodes have.
        StepTimeoutError
            If the daemons do not listen in time.
        DaemonError
            If a node can't be reached from this process, or has another version of lingualinked.

        Examples
        --------
        >>> with Cluster.on_ray(4, resources={"CPU": 8, "memory": "24GiB"}) as cluster:  # doctest: +SKIP
        ...     model = ShardedModel.from_pretrained(path, cluster=cluster)
        """
        from lingualinked.cluster.ray.ray_placement import Demand, RayPlacement  # imports zmq

        placing_s = _PLACING_S if timeout_s is None else check_positive(timeout_s, "timeout_s")
        placement = RayPlacement(num_devices, Demand.of(resources), strategy, runtime_env, placing_s)
        try:
            return cls(
                placement.devices,
                advertise=advertise,
                timeout_s=timeout_s,
                max_frame_bytes=max_frame_bytes,
                shared_memory=shared_memory,
                _placement=placement,
            )
        except BaseException:
            placement.close()
            raise

    @property
    def ray(self) -> RayPlacement | None:
        """What Ray has placed for this cluster; ``None`` if that is nothing."""
        return self._workers.placement

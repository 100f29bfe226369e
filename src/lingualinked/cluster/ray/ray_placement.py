"""Places devices on the nodes of a Ray cluster: a placement group, and an actor with a daemon in each of its bundles.

Knows Ray; not what the devices are used for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from lingualinked.checks import check_positive, is_integer
from lingualinked.cluster.ray.ray_actor import DaemonActor
from lingualinked.device import Device
from lingualinked.errors import ArgumentError, ResourceError, StepTimeoutError
from lingualinked.quantities import count_text
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.units import parse_bytes

Strategy = Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"]

_OWN = re.compile(r"^node:|_group_|^object_store_memory$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What each device asks of Ray: CPUs, which are its threads, perhaps a GPU and memory, and resources of any other name."""

    threads: int
    num_gpus: int
    memory_bytes: int | None
    others: Mapping[str, float]

    @classmethod
    def of(cls, resources: Mapping[str, Any] | None) -> Self:
        """Read resources as Ray names them, or raise ArgumentError for a value that can't be used."""
        if not isinstance(resources, Mapping | None):
            raise ArgumentError(f"resources={resources!r} must be a dict from Ray's names to amounts: CPU, GPU, memory")
        others = {"CPU": 1, "GPU": 0, "memory": None, **(resources or {})}
        threads, num_gpus, memory = (others.pop(name) for name in ("CPU", "GPU", "memory"))
        if not is_integer(threads, at_least=1):
            raise ArgumentError(
                f"resources has CPU={threads!r}: a device computes with one thread or more, each of its own CPU"
            )
        if num_gpus not in (0, 1):
            raise ArgumentError(f"resources has GPU={num_gpus!r}: a device computes on one GPU (1) or none (0)")
        for name, amount in others.items():
            check_positive(amount, f"resources has {name}")
        memory_bytes = None if memory is None else parse_bytes(memory, "memory in resources")
        return cls(threads=threads, num_gpus=int(num_gpus), memory_bytes=memory_bytes, others=others)

    def bundle(self) -> dict[str, float]:
        """Return it as a bundle of a placement group."""
        amounts = {"CPU": self.threads, "GPU": self.num_gpus, "memory": self.memory_bytes or 0, **self.others}
        return {name: amount for name, amount in amounts.items() if amount}

    def options(self) -> dict[str, Any]:
        """Return it as options of an actor."""
        return {
            "num_cpus": self.threads,
            "num_gpus": self.num_gpus,
            "memory": self.memory_bytes,
            "resources": dict(self.others),
        }

    @property
    def accelerator(self) -> str:
        """Where its worker computes: Ray shows an actor its own GPU alone."""
        return "cuda:0" if self.num_gpus else "cpu"

    def daemon_options(self) -> list[str]:
        """Return it as options of a daemon."""
        options = ["--threads", str(self.threads), "--accelerator", self.accelerator]
        return options if self.memory_bytes is None else [*options, "--memory", str(self.memory_bytes)]


class RayPlacement:
    """The devices that Ray has placed, each a daemon in an actor; they are there until `close`, or until this process is gone.

    Parameters
    ----------
    num_devices : int
        How many to place.
    demand : Demand
        Of each.
    strategy : str
        Of the placement group.
    runtime_env : mapping or None
        Of the actors.
    timeout_s : float
        Seconds until Ray has placed them, and again until all listen.
    """

    def __init__(
        self,
        num_devices: int,
        demand: Demand,
        strategy: Strategy,
        runtime_env: Mapping[str, Any] | None,
        timeout_s: float,
    ) -> None:
        if not is_integer(num_devices, at_least=1):
            raise ArgumentError(f"num_devices={num_devices!r} must be a positive integer")
        if strategy not in get_args(Strategy):
            raise ArgumentError(f"strategy={strategy!r} must be one of {', '.join(get_args(Strategy))}")
        self._ray = ray = _connect()
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.keys = generate_keypair()  # of the only caller that the daemons let in
        self._demand, self._timeout_s = demand, timeout_s
        self._actors: list[Any] = []
        self._lines = [""] * num_devices  # where their daemons were last heard to listen
        self._num_lives = [1] * num_devices
        self._group = ray.util.placement_group([demand.bundle()] * num_devices, strategy=strategy)
        try:
            # 1) let Ray choose a node for each
            self._wait_for_nodes(strategy)
            # 2) start them there: freed with this process whatever is usual in its job, and started again if they die
            actor = ray.remote(DaemonActor)
            lasting = {"lifetime": "non_detached", "max_restarts": -1, "max_task_retries": -1}
            for index in range(num_devices):
                place = PlacementGroupSchedulingStrategy(self._group, index)
                options = {
                    **demand.options(),
                    **lasting,
                    "scheduling_strategy": place,
                    "runtime_env": dict(runtime_env or {}),
                }
                arguments = (*demand.daemon_options(), "--authorize", self.keys.public)
                self._actors.append(actor.options(**options).remote(*arguments))
            # 3) hear where they listen
            self._lines = self._ask([each.listen.remote() for each in self._actors])
            self.devices = tuple(self._device(index) for index in range(num_devices))
        except BaseException:
            self.close()
            raise

    def restart(self, name: str) -> Device:
        """Return the device that takes the place of one whose worker has died, to be added to the cluster.

        Ray starts an actor again that has died, on the same node or another one; otherwise a new daemon is started in it.
        What is left of the device is ended.

        Parameters
        ----------
        name : str
            Of the device that has died (`WorkerDiedError.device`).

        Returns
        -------
        Device
            With a name of its own: ``"gpu-box-1.2"`` after ``"gpu-box-1"``.

        Raises
        ------
        ArgumentError
            If Ray has placed no such device, or it was restarted before.
        ResourceError
            If a daemon could not be started.
        StepTimeoutError
            If it does not listen within the time allowed, such as while no node has room for it.
        """
        names = [device.name for device in self.devices]
        if name not in names:
            raise ArgumentError(f"Ray has placed no device {name!r}: choose from {names}")
        index = names.index(name)
        (self._lines[index],) = self._ask([self._actors[index].listen.remote(self._lines[index])])
        self._num_lives[index] += 1
        self.devices = (*self.devices[:index], self._device(index), *self.devices[index + 1 :])
        return self.devices[index]

    def close(self) -> None:
        """Return to Ray what it has lent; does nothing if this process has left that Ray cluster meanwhile."""
        if self._ray.is_initialized():  # or the next line would start Ray again
            for actor in self._actors:
                with contextlib.suppress(ValueError):  # of another connection
                    self._ray.kill(actor)
            self._ray.util.remove_placement_group(self._group)
        self._actors.clear()

    def _wait_for_nodes(self, strategy: str) -> None:
        """Wait until each device has a node, or raise ResourceError."""
        from ray.util import placement_group_table

        deadline = time.monotonic() + self._timeout_s
        while not self._group.wait(1):
            is_possible = placement_group_table(self._group)["stats"]["scheduling_state"] != "INFEASIBLE"
            if is_possible and time.monotonic() < deadline:
                continue
            asked = f"{count_text(len(self._lines), 'device')} with {self._demand.bundle()} each ({strategy})"
            nodes = {
                f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": _amounts(node["Resources"])
                for node in self._ray.nodes()
                if node["Alive"]
            }
            if not is_possible:
                raise ResourceError(
                    f"Ray can't place {asked}: its nodes have {nodes}; ask for less, or add nodes first"
                )
            raise ResourceError(
                f"Ray did not place {asked} within {self._timeout_s:g} s: its nodes have {nodes}, of which "
                f"{_amounts(self._ray.available_resources())} is free now; ask for less, free the rest, or allow more time with timeout_s"
            )

    def _ask(self, answers: list[Any]) -> list[str]:
        """Wait for what actors answer; an error names what went wrong on their node."""
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return list(self._ray.get(answers, timeout=self._timeout_s))
        except GetTimeoutError as error:
            raise StepTimeoutError(
                f"the daemons on the nodes of Ray did not listen within {self._timeout_s:g} s: see the logs of their actors, or "
                "allow more time with timeout_s"
            ) from error
        except RayError as error:
            text = _ANSI.sub("", str(error)).strip()
            if "No module named 'lingualinked" in text:
                raise ResourceError(
                    "lingualinked is not installed on a node of the Ray cluster, or not for the Python that Ray runs there: install it on "
                    "every node, or name it in runtime_env"
                ) from error
            raise ResourceError(
                f"no daemon on a node of the Ray cluster: {text.rpartition('RuntimeError: ')[2]}"
            ) from error

    def _device(self, index: int) -> Device:
        """Return the device of a daemon, as Ray sees the node that it is on."""
        from ray.util import placement_group_table

        node_of = placement_group_table(self._group)["bundles_to_node_id"]
        node = next(node for node in self._ray.nodes() if node["NodeID"] == node_of[index])
        num_there = list(node_of.values()).count(node["NodeID"])
        address, _, server_key = self._lines[index].partition("#")
        memory_bytes = self._demand.memory_bytes
        if memory_bytes is None and not self._demand.num_gpus:
            memory_bytes = int(node["Resources"]["memory"]) // num_there
        life = self._num_lives[index]
        return Device(
            name=f"{node['NodeManagerHostname']}-{index}{f'.{life}' if life > 1 else ''}",
            accelerator=self._demand.accelerator,
            threads=self._demand.threads,
            memory=memory_bytes,
            address=address,
            server_key=server_key,
        )


def _connect() -> Any:
    """Return Ray, connected: as this process is already, or to the cluster that runs here or is named by RAY_ADDRESS."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ArgumentError("Ray is not installed: pip install 'lingualinked[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address="auto")
        except ConnectionError as error:
            raise ArgumentError(
                f"no running Ray cluster: start one with `ray start --head`, or connect with ray.init(address=...) ({error})"
            ) from error
    return ray


def _amounts(resources: Mapping[str, float]) -> dict[str, float]:
    """Return what there is of the resources that a device may ask for: not Ray's own names for nodes and bundles."""
    return {name: amount for name, amount in resources.items() if not _OWN.search(name)}

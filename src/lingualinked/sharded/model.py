"""`ShardedModel`: what users make, and what every sharded model is an instance of.

Knows arguments and who to ask; it imports torch and transformers only when a model is made, after the workers start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from lingualinked.checks import check_positive, is_integer
from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.devices import as_devices
from lingualinked.control.policy import RebalancePolicy
from lingualinked.device import Device, Links
from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.interrupts import interruptible
from lingualinked.planning.plan import DEFAULT_RESERVE, Plan
from lingualinked.sharded.arguments import check_interpreter
from lingualinked.sharded.memory_check import check_total_memory
from lingualinked.sharded.placing import fit_plan
from lingualinked.sharded.rebalancing import decide_from_profile, profile_with
from lingualinked.workload import Objective, Workload, check_objective

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.parts import ModelParts
    from lingualinked.profile import Profile
    from lingualinked.sharded.describing import Described
    from lingualinked.telemetry.decisions import Decision
    from lingualinked.telemetry.snapshot import Telemetry


class ShardedModel:
    """A Hugging Face causal LM whose layers run in worker processes.

    Made by `from_pretrained`; what that returns is also an instance of the model's own transformers class, so that
    ``generate``, ``transformers.pipeline`` and evaluation harnesses take it as theirs. It gives the tokens and the
    logits that the unsharded model gives under the same settings.
    """

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _pipeline: Pipeline
        _parts: ModelParts
        _owns_cluster: bool

        __call__: Callable[..., Any]
        generate: Callable[..., Any]
        config: PreTrainedConfig

    @classmethod
    @interruptible
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        devices: Literal["auto"] | int | Sequence[Device] = "auto",
        cluster: Cluster | None = None,
        plan: Plan | Literal["even"] | None = None,
        objective: Objective = "throughput",
        workload: Workload | None = None,
        max_kv_tokens: int | None = None,
        rebalance: Literal["auto"] | RebalancePolicy | None = None,
        seed: int | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        progress: bool = True,
        timeout_s: float | None = None,
        dtype: torch.dtype | str | None = "auto",
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        revision: str = "main",
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> ShardedModel:
        """Cut a checkpoint into layer ranges and load each in a worker process.

        Parameters
        ----------
        pretrained_model_name_or_path : str or PathLike
            A folder with ``config.json`` and safetensors files, or a model id of the Hugging Face hub.
        devices : "auto", int or sequence of Device
            Where to run: every accelerator found, else two CPU workers; so many local CPU workers; or these
            devices. A cluster is made for the model and ends with it.
        cluster : Cluster or None
            A cluster to run on instead; its workers are reused, and several models may share them.
        plan : Plan, "even" or None
            Which device holds which layers. ``None``: model and links are measured, and the best plan is solved for; both
            are kept on disk, so that only the first start costs that second. ``"even"``: every device gets layers, as
            even by bytes as they allow, and nothing is measured.
        objective : {"throughput", "latency", "energy"}
            What the solver minimises; see `solve`.
        workload : Workload or None
            What it plans for; ``None``: one session of 128 + 128 tokens. One session is in one stage at a time: a model that
            one device holds then stays there. ``Workload(num_sessions=8)`` spreads it where eight answers at once gain.
        max_kv_tokens : int or None
            Rows x tokens of KV that all sessions together may hold; ``None``: what memory allows.
        rebalance : "auto", RebalancePolicy or None
            Whether layers move by themselves, while sessions go on, when a device has become slower or faster or its memory
            runs out: with the default knobs, with these, or not (`rebalance` does it by hand). No token changes by it.
        seed : int or None
            Of the random weights of ``load_format="dummy"``; ``None``: 0.
        load_format : {"auto", "dummy"}
            ``"dummy"`` fills seeded random weights from a config alone, the same however the model is cut.
        progress : bool
            Whether to show a progress bar per worker while it loads.
        timeout_s : float or None
            Seconds that any one answer of a worker may take; ``None``: the cluster's (600).
        dtype : torch.dtype, str or None
            Of the weights; ``"auto"`` or ``None``: the config's, else the checkpoint's.
        config, revision, subfolder, token, cache_dir, local_files_only, attn_implementation, trust_remote_code
            As in ``AutoModelForCausalLM.from_pretrained``.
        **kwargs
            Further attributes of the model's config, as there. What transformers takes and a sharded model does not
            support is refused by name.

        Returns
        -------
        ShardedModel
            Also an instance of the model's transformers class.

        Raises
        ------
        ArgumentError
            If an argument is unknown or can't be used.
        UnsupportedOperationError
            If an argument of transformers has no sharded counterpart, or code of the model was replaced in this process.
        UncuttableModelError
            If the architecture can't be cut.
        CheckpointError
            If the checkpoint is missing, incomplete or damaged.
        InfeasiblePlanError
            If the layers don't fit the devices.
        WorkerError, WorkerDiedError, StepTimeoutError
            If a worker raised, ended, or did not answer while loading.
        """
        check_interpreter()
        if load_format not in ("auto", "dummy"):
            raise ArgumentError(f"load_format={load_format!r} must be 'auto' or 'dummy'")
        if not isinstance(plan, Plan | None) and plan != "even":
            raise ArgumentError(f"plan={plan!r} must be a lingualinked.Plan, 'even' or None")
        check_objective(objective)
        if not isinstance(workload, Workload | None):
            raise ArgumentError(f"workload is a {type(workload).__name__}: give a lingualinked.Workload")
        if max_kv_tokens is not None and not is_integer(max_kv_tokens, at_least=1):
            raise ArgumentError(f"max_kv_tokens={max_kv_tokens!r} must be a positive integer")
        if timeout_s is not None:
            check_positive(timeout_s, "timeout_s")
        if not isinstance(rebalance, RebalancePolicy | None) and rebalance != "auto":
            raise ArgumentError(f"rebalance={rebalance!r} must be 'auto', a lingualinked.RebalancePolicy or None")
        if cluster is not None and devices != "auto":
            raise ArgumentError("give devices= or cluster=, not both: a cluster brings its own devices")
        path = pretrained_model_name_or_path
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            what = repr(path) if isinstance(path, str) else f"of type {type(path).__name__}"
            raise ArgumentError(
                f"the model to load is {what}: give the folder of a checkpoint or a model id of the hub"
            )
        path = os.fspath(path)
        given = cluster
        asked = _asked_devices(devices) if given is None else given.devices
        if load_format == "auto" and config is None and not kwargs:  # else the headers do not tell what is loaded
            check_total_memory(
                Path(path) / subfolder,
                None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
                asked,
                workload if plan is None else None,
                DEFAULT_RESERVE if plan is None else 0.0,
            )
        try:
            cluster = given or Cluster(asked, timeout_s=timeout_s, _class_names=_class_names(path, subfolder))
            # Imports torch and transformers, while the workers start.
            from lingualinked.sharded.describing import LoadArguments
            from lingualinked.sharded.loading import load

            return load(
                LoadArguments.of(
                    path,
                    cluster,
                    owns_cluster=given is None,
                    plan=plan,
                    objective=objective,
                    workload=workload,
                    max_kv_tokens=max_kv_tokens,
                    policy=RebalancePolicy() if isinstance(rebalance, str) else rebalance,
                    seed=0 if seed is None else seed,
                    load_format=load_format,
                    progress=progress,
                    timeout_s=timeout_s,
                    dtype=dtype,
                    config=config,
                    revision=revision,
                    subfolder=subfolder,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    attn_implementation=attn_implementation,
                    trust_remote_code=trust_remote_code,
                    **kwargs,
                ),
                ShardedModel,
            )
        except BaseException:
            if given is None and cluster is not None:
                cluster.close()
            raise

    @property
    def plan(self) -> Plan:
        """Which device holds which layers; a profile that was doubtful is corrected by the steps since (`Profile.doubt`)."""
        return self._pipeline.corrected_plan

    @property
    def profile(self) -> Profile | None:
        """What the plan was made from; ``None`` if nothing was measured for it."""
        return self.plan.profile

    @property
    def cluster(self) -> Cluster:
        """The cluster whose workers hold the model."""
        return self._pipeline.cluster

    @property
    def telemetry(self) -> Telemetry:
        """What the stages and their workers have done so far, asked of them now, with the recent history.

        Of a closed model, what was known last.
        """
        return self._pipeline.telemetry()

    @interruptible
    def rebalance(self, plan: Plan | None = None, *, dry_run: bool = False) -> Decision:
        """Move layers while sessions go on, KV and all; no token changes.

        Devices load what they lack beside their steps and share what they hold already. Each session changes between two
        of its steps. Should anything fail before all have changed, the old plan goes on.

        Parameters
        ----------
        plan : Plan or None
            Of this model on devices of its cluster: solved for, or written by hand. ``None``: the best plan for devices as
            they are now, if a mean step takes less time by `RebalancePolicy.min_gain`; the model is measured for that where
            it has not been.
        dry_run : bool
            Whether only to say what would be done, and why.

        Returns
        -------
        Decision
            What was decided, with its numbers, and in ``migrations`` what was moved. Printed, it says why. `telemetry`
            keeps it too.

        Raises
        ------
        ArgumentError
            If it is no plan.
        InfeasiblePlanError
            If the plan is not one for this model and cluster, or its weights pass a device's memory limit.
        ClosedError, WorkerError, DeviceMemoryError, WorkerDiedError, StepTimeoutError
            If it could not be done.
        """
        if plan is None:
            self._measure()
            return self._pipeline.rebalance(None, self._parts.weights, dry_run=dry_run)
        if not isinstance(plan, Plan):
            raise ArgumentError(f"plan={plan!r} must be a lingualinked.Plan or None")
        model = None if self.profile is None else self.profile.model
        fitting = fit_plan(plan, self._parts.weights, self.cluster, model, self.plan.workload)
        return self._pipeline.rebalance(fitting, self._parts.weights, dry_run=dry_run)

    @interruptible
    def release(self, device: str) -> Decision:
        """Move all layers off a device while sessions go on, and place none there again; its worker stays.

        Parameters
        ----------
        device : str
            Its name.

        Returns
        -------
        Decision
            As `rebalance`.

        Raises
        ------
        ArgumentError
            If there is no such device.
        InfeasiblePlanError
            If the others can't hold the model; the message says how many bytes are missing.
        ClosedError, WorkerError, DeviceMemoryError, WorkerDiedError, StepTimeoutError
            If it could not be done; the device may be used as before then.
        """
        self.cluster.device(device)
        self._measure()
        return self._pipeline.release(device)

    @interruptible
    def admit(self, device: Device | str, *, links: Links | None = None) -> Decision:
        """Bring a device in while sessions go on: start its worker, measure the model on it, use it if that pays.

        Parameters
        ----------
        device : Device or str
            A new one, which the model's cluster takes in (`Cluster.add`), or the name of one that the cluster has already:
            released before, or added by another model.
        links : mapping of (str, str) to Link, optional
            Links from and to a new device, as in `Cluster`, where they are other than what their two ends give.

        Returns
        -------
        Decision
            As `rebalance`: whether layers have moved, and why.

        Raises
        ------
        ArgumentError
            If it is no device, or there is none of that name, or links are given for one that the cluster has already.
        ClosedError, WorkerError, DeviceMemoryError, WorkerDiedError, StepTimeoutError
            If its worker does not start, or layers could not be moved; the old plan goes on.
        """
        pipeline, is_new = self._pipeline, isinstance(device, Device)
        pipeline.check_open()
        if not isinstance(device, Device | str):
            raise ArgumentError(f"device={device!r} must be a lingualinked.Device or the name of one in the cluster")
        name = device.name if isinstance(device, Device) else device
        if is_new and any(name == each.name for each in self.cluster.devices):
            raise ArgumentError(f"device {name!r} is in the cluster already: admit it by its name")
        if not is_new:
            self.cluster.device(name)
            if links is not None:
                raise ArgumentError(f"device {name!r} is in the cluster: links= is for a device that comes new")
        self._measure()
        if isinstance(device, Device):
            self.cluster.add(device, links=links)
        return pipeline.admit(name, lambda: profile_with(pipeline, self._describe(), name))

    def _measure(self) -> None:
        """Have the pipeline decide from a profile, if it does not do so already."""
        pipeline = self._pipeline
        pipeline.check_open()
        if not pipeline.decides:
            decide_from_profile(pipeline, self._describe(), None, RebalancePolicy(), is_automatic=False)

    def _describe(self) -> Described:
        from lingualinked.sharded.describing import describe_spec  # imports torch

        return describe_spec(self._pipeline.spec)

    def close(self) -> None:
        """Free the model's stages; its private cluster, if it has one, ends too. Calls under way raise `ClosedError`."""
        self._pipeline.unload()
        if self._owns_cluster:
            self._pipeline.cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(
            "a sharded model can't be pickled or copied: its layers are in worker processes; make it where it is needed"
        )


def _asked_devices(devices: Literal["auto"] | int | Sequence[Device]) -> tuple[Device, ...]:
    """Return the devices that a cluster is to be made of."""
    if isinstance(devices, str):
        if devices != "auto":
            raise ArgumentError(
                f"devices={devices!r} must be 'auto', a number of local workers or a sequence of Device"
            )
        from lingualinked.cluster.discovery import local_devices

        devices = local_devices()
    return as_devices(devices)


def _class_names(path: str, subfolder: str) -> tuple[str, ...]:
    """Give the classes that a local checkpoint names, so that workers import them at once; none is no error."""
    try:
        architectures = json.loads((Path(path) / subfolder / "config.json").read_text()).get("architectures")
    except (OSError, ValueError, AttributeError):
        return ()
    return tuple(name for name in architectures or () if isinstance(name, str))

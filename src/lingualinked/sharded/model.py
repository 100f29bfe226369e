"""`ShardedModel`: the class that users load a model with, and the base class of every sharded model.

Knows arguments and delegates the work; imports torch and transformers only when a model is loaded, while the workers start.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.workers.devices import describe_cluster
from lingualinked.cluster_file import ClusterDescription, Devices
from lingualinked.control.policy import RebalancePolicy
from lingualinked.device import Device, Links
from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.interrupts import interruptible
from lingualinked.planning.plan import DEFAULT_RESERVE, Plan
from lingualinked.planning.transmission_map import TransmissionMap, map_transmission
from lingualinked.sharded.instruments.instrumented import Instrumented
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.memory_check import check_total_memory
from lingualinked.sharded.loading.named_classes import named_classes
from lingualinked.sharded.loading.placing import fit_plan
from lingualinked.sharded.profiles.rebalancing import enable_rebalancing, extended_profile
from lingualinked.sharded.weights.editable import Editable
from lingualinked.workload import Objective, Workload

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.profile import Profile
    from lingualinked.sharded.loading.describing import Described
    from lingualinked.telemetry.decisions import Decision
    from lingualinked.telemetry.snapshot import Telemetry


class ShardedModel(Instrumented, Editable):
    """A Hugging Face causal LM whose layers run in worker processes.

    Load it with `from_pretrained`. The result is also an instance of the model's own transformers class, so it works with
    ``generate``, ``transformers.pipeline`` and evaluation harnesses. Its tokens and logits are exactly those of the
    unsharded model under the same settings.
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
        devices: Devices = "auto",
        cluster: Cluster | None = None,
        plan: Plan | tuple[Plan, Plan] | Literal["even"] | None = None,
        objective: Objective = "throughput",
        workload: Workload | None = None,
        max_kv_tokens: int | None = None,
        batch_invariant: bool = False,
        towers: bool = True,
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
        task: str | None = None,
        **kwargs: Any,
    ) -> ShardedModel:
        """Cut a checkpoint into layer ranges and load each in a worker process.

        Parameters
        ----------
        pretrained_model_name_or_path : str or PathLike
            A folder with ``config.json`` and safetensors files, or a model id of the Hugging Face hub; or a folder with a LoRA
            adapter of peft (``adapter_config.json``), whose base model is loaded, and then the adapter.
        devices : "auto", int, str, PathLike or sequence of Device
            Where to run: every accelerator found, else two CPU workers; a number of local CPU workers; the given
            devices; those of a cluster file (TOML); or ``"tcp://HOST:PORT#PUBLIC-KEY"`` of a daemon. A cluster is started
            for the model and closed with it; see `Cluster`.
        cluster : Cluster or None
            A running cluster to use instead; several models may share its workers.
        plan : Plan, "even" or None
            Which device holds which layers. ``None``: measure the model and the links, and solve for the best plan; both
            are kept on disk, so that only the first start takes about a second longer. ``"even"``: split the bytes of the
            layers as evenly as possible over all devices, without measuring. An encoder-decoder model has two plans, of its encoder
            and of its decoder, each over all devices.
        objective : {"throughput", "latency", "energy"}
            What the solver minimises; see `solve`.
        workload : Workload or None
            The requests to plan for; ``None``: answers of 128 tokens to prompts of 128, and any number of them at once: the model
            is spread over devices if that hardly delays an answer alone and several at once gain from it. ``Workload()`` plans for
            one at a time, which is in one stage at a time, so that a model that fits one device stays there;
            ``Workload(num_sessions=8)`` for eight.
        max_kv_tokens : int or None
            KV budget of all sessions together, in rows x tokens; ``None``: what memory allows. A static KV cache counts its
            whole length from the first step on.
        batch_invariant : bool
            Whether a text's tokens and logits have the same bits alone and in any batch, in any number of stages and
            threads. Padding is left out, and what mixes rows is refused. Workers that can't promise it refuse the model.
        towers : bool
            Whether the first stage holds what encodes pictures, if the model has it; without, it takes texts alone.
        rebalance : "auto", RebalancePolicy or None
            Whether layers move automatically, while sessions go on, when a device becomes slower or faster or its memory
            runs out: with the default policy, with the given one, or not at all (`rebalance` moves them by hand). Tokens do
            not change.
        seed : int or None
            Seed of the random weights of ``load_format="dummy"``; ``None``: 0.
        load_format : {"auto", "dummy"}
            ``"dummy"`` fills in seeded random weights from a config alone; they do not depend on how the model is cut.
        progress : bool
            Whether to show a progress bar per worker while it loads.
        timeout_s : float or None
            Maximal seconds for any one answer of a worker; ``None``: the cluster's (600).
        dtype : torch.dtype, str or None
            Dtype of the weights; ``"auto"`` or ``None``: the config's, else the checkpoint's.
        config, revision, subfolder, token, cache_dir, local_files_only, attn_implementation, trust_remote_code
            As in ``AutoModelForCausalLM.from_pretrained``.
        task : str or None
            What the model is for, by the names of ``transformers.pipeline``: ``"text-generation"``, ``"text-classification"`` (or
            ``"sentiment-analysis"``), ``"token-classification"``, ``"question-answering"``, or ``"feature-extraction"`` for the
            last hidden states, as of ``AutoModel``. ``None``: as the checkpoint says (``architectures`` in its config). The head's
            weights must be in the checkpoint.
        **kwargs
            Further attributes of the model's config, as there. Arguments of transformers that a sharded model does not
            support are refused by name.

        Returns
        -------
        ShardedModel
            Also an instance of the model's transformers class.

        Raises
        ------
        ArgumentError
            If an argument is unknown or can't be used.
        UnsupportedOperationError
            If an argument of transformers is not supported, code of the model was replaced in this process, or
            ``batch_invariant`` can't be promised.
        UncuttableModelError
            If the architecture can't be cut.
        CheckpointError
            If the checkpoint is missing, incomplete or damaged.
        InfeasiblePlanError
            If the layers don't fit the devices.
        WorkerError, WorkerDiedError, StepTimeoutError
            If a worker raises, dies, or does not answer in time while loading.
        """
        # 1) check the arguments
        arguments = LoadArguments.of(
            pretrained_model_name_or_path,
            plan=plan,
            objective=objective,
            workload=workload,
            max_kv_tokens=max_kv_tokens,
            batch_invariant=batch_invariant,
            towers=towers,
            rebalance=rebalance,
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
            task=task,
            **kwargs,
        )
        if cluster is not None and devices != "auto":
            raise ArgumentError("pass devices= or cluster=, not both: a cluster has its own devices")
        folder = Path(arguments.path) / subfolder
        described = ClusterDescription(devices=cluster.devices) if cluster else describe_cluster(devices)
        # 2) refuse what exceeds all memory, before any process starts (only the headers of an unmodified model tell)
        if load_format == "auto" and config is None and not kwargs:
            check_total_memory(
                folder,
                None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
                described.devices,
                workload if plan is None else None,
                DEFAULT_RESERVE if plan is None else 0.0,
            )
        # 3) start the workers; while they start, import torch and transformers and load
        own = None
        try:
            if cluster is None:
                cluster = own = Cluster(described, timeout_s=timeout_s, _class_names=named_classes(folder))
            from lingualinked.sharded.loading.load import load  # imports torch

            return load(dataclasses.replace(arguments, cluster=cluster, owns_cluster=own is not None), ShardedModel)
        except BaseException:
            if own is not None:
                own.close()
            raise

    @property
    def plan(self) -> Plan:
        """Which device holds which layers; a doubtful profile (`Profile.doubt`) is corrected by the steps since."""
        return self._pipeline.corrected_plan

    @property
    def profile(self) -> Profile | None:
        """The profile that the plan was made from; ``None`` if it was made without one."""
        return self.plan.profile

    @property
    def transmission_map(self) -> TransmissionMap:
        """Which tensors each stage consumes, from which stage they come, and how many bytes they are; shows itself as a table."""
        plan = self.plan
        hidden_bytes = self._describe().footprint().profile.hidden_bytes
        return map_transmission(plan.stages, self._parts.transmission, hidden_bytes)

    @property
    def independent_rows(self) -> int:
        """Rows from which on the bits of a batch's row do not depend on the others, so that it may be split; 0: they may.

        That is what the workers' torch was found to do in this dtype, on their processors and with their threads, for
        products, attention and elementwise functions: in bfloat16 2, for example, where one row is summed in another order.
        """
        return self._pipeline.independent_rows

    @property
    def cluster(self) -> Cluster:
        """The cluster whose workers hold the model."""
        return self._pipeline.cluster

    @property
    def telemetry(self) -> Telemetry:
        """The state of the stages and their workers, requested from them now, with the recent history.

        If the model is closed, the last known state.
        """
        return self._pipeline.telemetry()

    @interruptible
    def rebalance(self, plan: Plan | None = None, *, dry_run: bool = False) -> Decision:
        """Move layers with their KV while sessions go on; tokens do not change.

        Devices load missing layers in the background and share those that they hold already. Each session switches to the
        new plan between two of its steps. If anything fails before all have switched, the old plan stays in force.

        Parameters
        ----------
        plan : Plan or None
            A plan for this model on devices of its cluster. ``None``: solve for the best plan at present speeds, and move if
            a mean step gets faster by `RebalancePolicy.min_gain`; the model is measured first if it has not been.
        dry_run : bool
            Whether only to return what would be done, and why.

        Returns
        -------
        Decision
            What was decided and why, with its numbers, and in ``migrations`` what was moved. `telemetry` keeps it too.

        Raises
        ------
        ArgumentError
            If it is not a plan.
        InfeasiblePlanError
            If the plan does not fit this model or cluster, its weights exceed a device's memory limit, or full devices that
            change their order would wait for each other: then the message names the bytes that are missing, and where.
        ClosedError, WorkerError, DeviceMemoryError, WorkerDiedError, StepTimeoutError
            If the layers could not be moved.
        """
        if plan is None:
            self._enable_rebalancing()
            return self._pipeline.rebalance(None, self._parts, dry_run=dry_run)
        if not isinstance(plan, Plan):
            raise ArgumentError(f"plan={plan!r} must be a lingualinked.Plan or None")
        model = None if self.profile is None else self.profile.model
        fitting = fit_plan(plan, self._parts, self.cluster, model, self.plan.workload)
        return self._pipeline.rebalance(fitting, self._parts, dry_run=dry_run)

    @interruptible
    def release(self, device: str) -> Decision:
        """Move all layers off a device while sessions go on, and use it no more until `admit`; its worker keeps running.

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
            If the layers could not be moved; the device may then be used as before.
        """
        self.cluster.device(device)
        self._enable_rebalancing()
        return self._pipeline.release(device)

    @interruptible
    def admit(self, device: Device | str, *, links: Links | None = None) -> Decision:
        """Add a device while sessions go on: start its worker, measure the model on it, and use it if that pays.

        Parameters
        ----------
        device : Device or str
            A new device, which is added to the model's cluster (`Cluster.add`); or the name of a device in the cluster that
            was released before or added by another model.
        links : mapping of (str, str) to Link, optional
            Links from and to a new device, as in `Cluster`, that differ from what their two ends imply.

        Returns
        -------
        Decision
            As `rebalance`: whether layers have moved, and why.

        Raises
        ------
        ArgumentError
            If it is not a device, there is none of that name, or links are given for a device in the cluster.
        ClosedError, WorkerError, DeviceMemoryError, WorkerDiedError, StepTimeoutError
            If its worker does not start, or layers could not be moved; the old plan stays in force.
        """
        pipeline, is_new = self._pipeline, isinstance(device, Device)
        pipeline.check_open()
        if not isinstance(device, Device | str):
            raise ArgumentError(f"device={device!r} must be a lingualinked.Device or the name of one in the cluster")
        name = device.name if isinstance(device, Device) else device
        if is_new and any(name == each.name for each in self.cluster.devices):
            raise ArgumentError(f"device {name!r} is in the cluster already: pass its name instead")
        if not is_new:
            self.cluster.device(name)
            if links is not None:
                raise ArgumentError(
                    f"device {name!r} is in the cluster already: links= is for a new device, leave it out"
                )
        self._enable_rebalancing()
        if isinstance(device, Device):
            self.cluster.add(device, links=links)
        return pipeline.admit(name, lambda: extended_profile(pipeline, self._describe(), name))

    def _enable_rebalancing(self) -> None:
        """Get the profile that rebalancing needs, unless the pipeline has it already."""
        pipeline = self._pipeline
        pipeline.check_open()
        if not pipeline.is_rebalancing_enabled:
            enable_rebalancing(pipeline, self._describe(), None, RebalancePolicy(), is_automatic=False)

    def _describe(self) -> Described:
        from lingualinked.sharded.loading.describing import describe_spec  # imports torch

        return describe_spec(self._pipeline.spec)

    def close(self) -> None:
        """Free the model's stages, and close its private cluster if it has one. Calls in progress raise `ClosedError`."""
        try:
            self._pipeline.unload()
        finally:  # an interrupt ends the wait for the last reports, and leaves nothing open
            if self._owns_cluster:
                self._pipeline.cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(
            "a sharded model can't be pickled or copied: its layers are in worker processes; load it where it is needed"
        )

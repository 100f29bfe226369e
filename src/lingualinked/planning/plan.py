"""The plan: an immutable assignment of contiguous layer spans to devices, with what it was made from.

Knows no process and no solver; it is what the cluster is asked to place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from lingualinked.checks import is_count
from lingualinked.device import Device
from lingualinked.environment import Environments, inexact_because
from lingualinked.errors import ArgumentError, InfeasiblePlanError
from lingualinked.planning.comparison import Comparison
from lingualinked.planning.explanation import Explanation
from lingualinked.planning.planned_stage import PlannedStage
from lingualinked.planning.prediction import Prediction
from lingualinked.planning.prefill_prediction import PrefillPrediction, predict_prefill
from lingualinked.planning.solved import Solved
from lingualinked.planning.transmission_map import TransmissionMap, map_transmission
from lingualinked.profile import Profile
from lingualinked.quantities import count_text
from lingualinked.registry import explanation_of, figure_of
from lingualinked.shown import Shown
from lingualinked.transmission import Transmission
from lingualinked.weight_bytes import WeightBytes
from lingualinked.workload import Workload

DEFAULT_RESERVE = 0.05
"""Share of every device's memory that plans leave free."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Shown):
    """Which device runs which layers, in pipeline order.

    Parameters
    ----------
    stages : tuple of PlannedStage
        Contiguous spans from layer 0 on. A device may hold the first and the last stage both.
    inexact_because : str
        Why the placement can't give the unsharded model's bits; empty if it can.
    profile : Profile or None
        What it is predicted from; ``None`` for a plan that was written by hand or split by bytes.
    workload : Workload or None
        What it was made for.
    reserve : float
        Share of every device's memory that it leaves free.
    solved : Solved or None
        What the solver says of it; ``None`` if no solver made it.

    Raises
    ------
    ArgumentError
        If there is no stage, a span is empty, the spans leave a gap or overlap, or a device holds stages that are not
        the first and the last.
    """

    stages: tuple[PlannedStage, ...]
    inexact_because: str = ""
    profile: Profile | None = dataclasses.field(default=None, repr=False)
    workload: Workload | None = None
    reserve: float = DEFAULT_RESERVE
    solved: Solved | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ArgumentError("a plan needs at least one stage")
        if not 0 <= self.reserve < 1:
            raise ArgumentError(f"reserve={self.reserve!r} of a plan must be a share of memory, from 0 to below 1")
        expected = 0
        for stage in self.stages:
            if not isinstance(stage.start, int) or not isinstance(stage.end, int):
                raise ArgumentError(
                    f"stage [{stage.start!r}, {stage.end!r}) on device {stage.device!r}: layers are integers"
                )
            if stage.start != expected or stage.end <= stage.start:
                raise ArgumentError(
                    f"stage [{stage.start}, {stage.end}) on device {stage.device!r} must start at layer {expected} "
                    "and hold at least one layer: spans are half-open, contiguous and in pipeline order"
                )
            expected = stage.end
        names = [stage.device for stage in self.stages]
        for name in names:
            positions = [index for index, other in enumerate(names) if other == name]
            if len(positions) > 1 and positions != [0, len(names) - 1]:
                raise ArgumentError(
                    f"device {name!r} holds stages {positions}: a device holds one stage, or the first and the last"
                )

    @classmethod
    def from_spans(
        cls,
        spans: Iterable[tuple[str, int, int]],
        *,
        profile: Profile | None = None,
        workload: Workload | None = None,
    ) -> Plan:
        """Write a plan by hand.

        Parameters
        ----------
        spans : iterable of (str, int, int)
            Device name, start and end of each stage in pipeline order.
        profile : Profile or None
            What to predict it from.
        workload : Workload or None
            What it is for.

        Returns
        -------
        Plan
            The plan; its weight bytes are known with a profile only.

        Examples
        --------
        >>> Plan.from_spans([("a", 0, 4), ("b", 4, 12)]).num_layers
        12
        """
        stages = tuple(PlannedStage(device=device, start=start, end=end) for device, start, end in spans)
        plan = cls(stages=stages, workload=workload)
        if profile is None:
            return plan
        model = profile.model
        check_plan(plan, model.num_layers, profile.names, model.transmission)
        plan = dataclasses.replace(plan, profile=profile, workload=model.fit_workload(workload))
        return complete_plan(
            plan,
            model.weights,
            [each.device for each in profile.devices],
            profile.environments,
        )

    @property
    def num_layers(self) -> int:
        """Number of layers of the whole model."""
        return self.stages[-1].end

    @property
    def spans(self) -> tuple[tuple[str, int, int], ...]:
        """Device, start and end of each stage."""
        return tuple((stage.device, stage.start, stage.end) for stage in self.stages)

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices in use, each once, in pipeline order."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def held(self) -> tuple[str, ...]:
        """Paths of the parts that every stage holds: what they compute is not sent; empty without a profile."""
        return () if self.profile is None else self.profile.model.transmission.held

    def held_instead(self, transmission: Transmission) -> tuple[str, ...]:
        """Return those of the parts that every stage holds whose outputs are shortcuts in a model's own map."""
        return tuple(part for part in self.held if part not in transmission.held)

    @property
    def exact(self) -> bool:
        """Whether the placement gives the bits of the unsharded model under the same settings.

        That model is uncut transformers on any one of the machines that hold stages, with their versions of torch and
        transformers, their accelerator and as many threads. So all stages must have those in common, and their processors
        the instruction set; where processors differ in name, their workers compare the bits of products, attention and
        elementwise functions when they load. The caller must have the same transformers and release of torch, by which it
        prepares steps and turns logits into tokens; its processor does not count. A plan that no worker has loaded yet
        knows of versions and processors what its profile has measured, or nothing.
        """
        return not self.inexact_because

    @property
    def trusted_layers(self) -> tuple[int, int]:
        """How many layers at the beginning and at the end stay on trusted devices, as its workload says."""
        return (0, 0) if self.workload is None else self.workload.trusted_layers

    @property
    def predicted(self) -> Prediction:
        """What it is predicted to do under the workload that it was made for.

        Raises
        ------
        ArgumentError
            If the plan has no profile.
        """
        return self.predict(self.measured.model.fit_workload(self.workload))

    def predict(self, workload: Workload) -> Prediction:
        """Predict what it does under a workload.

        Raises
        ------
        ArgumentError
            If the plan has no profile.
        """
        if not isinstance(workload, Workload):
            raise ArgumentError(f"workload is a {type(workload).__name__}: give a lingualinked.Workload")
        return _predict(self, self.measured, workload)

    def predict_prefill(
        self, prompt_tokens: int, *, batch_size: int = 1, prefill_chunk_size: int | Literal["auto"] = "auto"
    ) -> PrefillPrediction:
        """Predict the time from a prompt to its first token, in chunks that follow each other through the stages.

        Parameters
        ----------
        prompt_tokens : int
            Tokens of the prompt, per row.
        batch_size : int
            Rows.
        prefill_chunk_size : int or "auto"
            Tokens of a chunk, per row; ``"auto"``: the number of which the prediction is best.

        Raises
        ------
        ArgumentError
            If a number is not positive, or the plan has no profile.
        """
        from lingualinked.planning.predicting import prefill_costs  # imports NumPy

        size = None if prefill_chunk_size == "auto" else prefill_chunk_size
        for name, value in (("prompt_tokens", prompt_tokens), ("batch_size", batch_size), ("prefill_chunk_size", size)):
            if value is not None and not is_count(value):
                raise ArgumentError(f"{name}={value!r} must be a positive integer")
        return predict_prefill(*prefill_costs(self.stages, self.measured, batch_size), prompt_tokens, size)

    @property
    def measured(self) -> Profile:
        """The profile that it is predicted from.

        Raises
        ------
        ArgumentError
            If it has none.
        """
        if self.profile is None:
            raise ArgumentError(
                "the plan has no profile to predict from: make it with lingualinked.solve(profile), or give "
                "Plan.from_spans the profile"
            )
        return self.profile

    def compare(self, *others: Plan, names: Sequence[str] = ()) -> Comparison:
        """Hold this plan's predictions against those of others, under this plan's workload.

        Parameters
        ----------
        *others : Plan
            Of the same model, each with a profile of its own or else predicted from this plan's.
        names : sequence of str
            What to call this plan and the others; by default they are numbered.

        Returns
        -------
        Comparison
            Shows itself as a table.

        Raises
        ------
        ArgumentError
            If a plan is of another number of layers, the names are not as many as the plans, or this one has no profile.
        """
        for plan in others:
            if not isinstance(plan, Plan):
                raise ArgumentError(
                    f"a {type(plan).__name__} can't be compared with a plan: give lingualinked.Plan objects"
                )
            if plan.num_layers != self.num_layers:
                raise ArgumentError(
                    f"a plan of {count_text(plan.num_layers, 'layer')} can't be compared with one of {self.num_layers}"
                )
        plans = (self, *others)
        names = tuple(names) or tuple(f"plan {index}" for index in range(len(plans)))
        if len(names) != len(plans):
            raise ArgumentError(
                f"names={names} for {count_text(len(plans), 'plan')}: give one for each, this plan's first"
            )
        workload = self.measured.model.fit_workload(self.workload)
        predictions = tuple(_predict(plan, plan.profile or self.measured, workload) for plan in plans)
        return Comparison(names=names, predictions=predictions)

    def explain(self) -> Explanation:
        """Say what limits the plan, what would help most, and whether another device would.

        Returns
        -------
        Explanation
            Shows itself as text; the figures are its attributes.

        Raises
        ------
        ArgumentError
            If the plan has no profile.
        """
        explanation: Explanation = explanation_of(self)  # by changed problems, solved again
        return explanation

    @property
    def transmission_map(self) -> TransmissionMap:
        """Which tensors each stage consumes, from which stage they come, and how many bytes they are.

        Raises
        ------
        ArgumentError
            If the plan has no profile.
        """
        model = self.measured.model
        return map_transmission(self.stages, model.transmission, model.hidden_bytes)

    def plot(self) -> Any:
        """Draw layers on devices, with memory and time (needs matplotlib: ``pip install lingualinked[plot]``).

        Returns
        -------
        matplotlib.figure.Figure
        """
        return figure_of(self)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises
        ------
        ArgumentError
            If the text is no plan.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ArgumentError(f"not the JSON of a plan: {error}") from error


def _predict(plan: Plan, profile: Profile, workload: Workload) -> Prediction:
    from lingualinked.planning.predicting import predict  # imports NumPy

    return predict(plan.stages, profile, workload, plan.reserve)


def complete_plan(
    plan: Plan,
    weights: WeightBytes,
    devices: Iterable[Device],
    environments: Environments | None = None,
) -> Plan:
    """Fill in the bytes of a plan's stages, and whether its devices give the unsharded model's bits, by what is known."""
    by_name = {device.name: device for device in devices}
    return dataclasses.replace(
        plan,
        stages=tuple(
            dataclasses.replace(stage, weight_bytes=weights.of_span(stage.start, stage.end)) for stage in plan.stages
        ),
        inexact_because=inexact_because([by_name[name] for name in plan.devices], environments),
    )


def check_plan(
    plan: Plan, num_layers: int, device_names: Iterable[str], transmission: Transmission | None = None
) -> None:
    """Refuse a plan with another number of layers, with a device that is not in the cluster, or with a cut that the model forbids."""
    if plan.num_layers != num_layers:
        raise InfeasiblePlanError(f"the plan places {count_text(plan.num_layers, 'layer')}, the model has {num_layers}")
    known = set(device_names)
    for stage in plan.stages:
        if stage.device not in known:
            raise InfeasiblePlanError(f"the plan uses device {stage.device!r}, the cluster has {sorted(known)}")
        if transmission is not None:
            transmission.check_cut(stage.start)

"""The plan: an immutable assignment of contiguous layer spans to devices.

Knows no model and no process; it is what the cluster is asked to place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import msgspec

from lingualinked.device import Device
from lingualinked.errors import ArgumentError, InfeasiblePlanError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One position in the pipeline: a span of layers on one device.

    Parameters
    ----------
    device : str
        Name of the device.
    start, end : int
        The half-open layer range ``[start, end)``.
    weight_bytes : int
        Bytes of the weights that the stage holds, embeddings and head included; 0 if not known.
    """

    device: str
    start: int
    end: int
    weight_bytes: int = 0

    @property
    def num_layers(self) -> int:
        """Number of layers of the span."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which device runs which layers, in pipeline order.

    Parameters
    ----------
    stages : tuple of PlannedStage
        Contiguous spans from layer 0 on. A device may hold the first and the last stage both.
    inexact_because : str
        Why the placement can't give the unsharded model's bits; empty if it can.

    Raises
    ------
    ArgumentError
        If there is no stage, a span is empty, the spans leave a gap or overlap, or a device holds stages that are not
        the first and the last.
    """

    stages: tuple[PlannedStage, ...]
    inexact_because: str = ""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ArgumentError("a plan needs at least one stage")
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
    def from_spans(cls, spans: Iterable[tuple[str, int, int]]) -> Plan:
        """Write a plan by hand.

        Parameters
        ----------
        spans : iterable of (str, int, int)
            Device name, start and end of each stage in pipeline order.

        Returns
        -------
        Plan
            The plan, with weight bytes not known.

        Examples
        --------
        >>> Plan.from_spans([("a", 0, 4), ("b", 4, 12)]).num_layers
        12
        """
        return cls(stages=tuple(PlannedStage(device=device, start=start, end=end) for device, start, end in spans))

    @property
    def num_layers(self) -> int:
        """Number of layers of the whole model."""
        return self.stages[-1].end

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices in use, each once, in pipeline order."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def exact(self) -> bool:
        """Whether the placement gives the bits of the unsharded model under the same settings."""
        return not self.inexact_because

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

    def __str__(self) -> str:
        from lingualinked.display.plan import plan_text  # the one upward arrow: plain data that can be drawn

        return plan_text(self)

    def _repr_html_(self) -> str:
        from lingualinked.display.plan import plan_html

        return plan_html(self)


def check_memory(plan: Plan, devices: Iterable[Device]) -> None:
    """Refuse a plan that puts more weights on a device than its memory limit allows.

    Parameters
    ----------
    plan : Plan
        With the weight bytes of its stages.
    devices : iterable of Device
        All that it uses.

    Raises
    ------
    InfeasiblePlanError
        If the weights of a device's stages pass its limit; the message says by how many bytes.
    """
    for device in devices:
        num_bytes = sum(stage.weight_bytes for stage in plan.stages if stage.device == device.name)
        limit = device.memory_bytes
        if limit is not None and num_bytes > limit:
            raise InfeasiblePlanError(
                f"the plan puts {num_bytes:,} bytes of weights on device {device.name!r}, which has {limit:,} bytes of "
                f"memory: {num_bytes - limit:,} bytes are missing; raise its memory or give it fewer layers",
                missing_bytes=num_bytes - limit,
            )


def check_plan(plan: Plan, num_layers: int, device_names: Iterable[str]) -> None:
    """Refuse a plan that is not one for this model and these devices.

    Raises
    ------
    InfeasiblePlanError
        If the number of layers differs, or a device is not in the cluster.
    """
    if plan.num_layers != num_layers:
        raise InfeasiblePlanError(f"the plan places {plan.num_layers} layers, the model has {num_layers}")
    known = set(device_names)
    for stage in plan.stages:
        if stage.device not in known:
            raise InfeasiblePlanError(f"the plan uses device {stage.device!r}, the cluster has {sorted(known)}")

"""The measurements that a plan is made from: times of layers on each device, latency and bandwidth of each link.

Plain data, saved as JSON; knows neither how it is measured nor what is planned with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path

import msgspec

from lingualinked.checks import MOST, is_count
from lingualinked.device import CALLER, Device
from lingualinked.environment import Environment, Environments
from lingualinked.errors import ArgumentError
from lingualinked.link_profile import LinkProfile
from lingualinked.module_times import ModuleTimes
from lingualinked.quantities import count_text
from lingualinked.rounding import Rounding
from lingualinked.shown import Shown
from lingualinked.transmission import Transmission
from lingualinked.weight_bytes import WeightBytes
from lingualinked.whole_file import write_whole_file
from lingualinked.workload import Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """The sizes of a model in bytes, layer by layer.

    Parameters
    ----------
    name : str
        Path or hub id of the model.
    fingerprint : str
        Hash of configuration and dtype: equal for profiles of the same model.
    dtype : str
        Dtype of the weights.
    kinds : tuple of str
        Descriptions of the distinct kinds of layers.
    kind_of_layer : tuple of int
        Index into `kinds`, for each layer.
    layer_weight_bytes, layer_kv_bytes : tuple of int
        Weight bytes of each layer, and bytes of its KV per token of one row.
    layer_state_bytes : tuple of int
        Bytes that each layer keeps of one row however long its text is, such as a recurrent state; empty: none keeps any.
    layer_windows : tuple of int or None
        Tokens that each layer's KV holds at most; ``None``: all.
    prologue_bytes, epilogue_bytes, tied_bytes : int
        Weights that only the first stage and only the last stage needs, and weights that both share.
    hidden_bytes, logits_bytes : int
        Bytes per row and token that cross a hop, and bytes per row that return to the caller.
    working_bytes : int
        Bytes of intermediate results per row and token of a step.
    max_positions : int or None
        Maximal tokens of a text if positions are learned; ``None`` if they are computed.
    everywhere_bytes : int
        Weights that every stage holds.
    transmission : Transmission
        What crosses boundaries between stages beside hidden states, and where no stage may begin.
    """

    name: str
    fingerprint: str
    dtype: str
    kinds: tuple[str, ...]
    kind_of_layer: tuple[int, ...]
    layer_weight_bytes: tuple[int, ...]
    layer_kv_bytes: tuple[int, ...]
    layer_windows: tuple[int | None, ...]
    prologue_bytes: int
    epilogue_bytes: int
    tied_bytes: int
    hidden_bytes: int
    logits_bytes: int
    working_bytes: int
    max_positions: int | None = None
    layer_state_bytes: tuple[int, ...] = ()
    everywhere_bytes: int = 0
    transmission: Transmission = dataclasses.field(default_factory=Transmission)

    def __post_init__(self) -> None:
        num_layers = len(self.kind_of_layer)
        if not self.layer_state_bytes:
            object.__setattr__(self, "layer_state_bytes", (0,) * num_layers)
        for name in ("layer_weight_bytes", "layer_kv_bytes", "layer_state_bytes", "layer_windows"):
            if len(getattr(self, name)) != num_layers or not num_layers:
                raise ArgumentError(
                    f"{name} of a model profile has {count_text(len(getattr(self, name)), 'value')} for {count_text(num_layers, 'layer')}: give one per layer"
                )
        if not all(0 <= kind < len(self.kinds) for kind in self.kind_of_layer):
            raise ArgumentError(f"kind_of_layer must hold indices into {count_text(len(self.kinds), 'kind')} of layers")
        weights = ("prologue_bytes", "epilogue_bytes", "tied_bytes", "everywhere_bytes")
        once = (*weights, "hidden_bytes", "logits_bytes", "working_bytes")
        by_layer = (*self.layer_weight_bytes, *self.layer_kv_bytes, *self.layer_state_bytes)
        for size in (*by_layer, *(getattr(self, name) for name in once)):
            if not 0 <= size <= MOST:
                raise ArgumentError(f"a size of a model profile is {size}: sizes must be from 0 to {MOST} bytes")
        if self.tied_bytes > min(self.prologue_bytes, self.epilogue_bytes):
            raise ArgumentError(f"tied_bytes={self.tied_bytes} of a model profile exceed its prologue or its epilogue")
        if not all(window is None or is_count(window) for window in self.layer_windows):
            raise ArgumentError(f"layer_windows={self.layer_windows} of a model profile must be of at least one token")
        self.transmission.check_layers(num_layers)

    def fit_workload(self, workload: Workload | None) -> Workload:
        """Check that the model can run a workload, and return it; for ``None``, return the default one, shortened if necessary.

        Raises
        ------
        ArgumentError
            If its texts are longer than the learned positions.
        """
        default, limit = Workload(), self.max_positions
        if workload is None:
            if limit is None or default.num_tokens <= limit:
                return default
            prompt_tokens = max(1, limit // 2)
            return dataclasses.replace(default, prompt_tokens=prompt_tokens, new_tokens=max(1, limit - prompt_tokens))
        if not isinstance(workload, Workload):
            raise ArgumentError(f"workload is a {type(workload).__name__}: pass a lingualinked.Workload")
        if limit is not None and workload.num_tokens > limit:
            raise ArgumentError(
                f"prompt_tokens={workload.prompt_tokens} and new_tokens={workload.new_tokens} of the workload exceed "
                f"the {count_text(limit, 'position')} that the model has learned: plan for shorter texts"
            )
        return workload

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.kind_of_layer)

    @property
    def weights(self) -> WeightBytes:
        """Bytes of its weights, by where they are needed."""
        return WeightBytes(
            layers=self.layer_weight_bytes,
            prologue=self.prologue_bytes,
            epilogue=self.epilogue_bytes,
            tied=self.tied_bytes,
            everywhere=self.everywhere_bytes,
        )

    def span_bytes(self, start: int, end: int) -> int:
        """Weight bytes of a stage of layers ``[start, end)``."""
        return self.weights.of_span(start, end)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """The measured times of a model's parts on one device.

    Parameters
    ----------
    device : Device
        The device, as in the cluster.
    hardware : str
        Description of its processor.
    layers : tuple of ModuleTimes
        Times of one layer of each kind.
    stage : ModuleTimes
        Times of a stage's work outside its modules.
    prologue, epilogue : ModuleTimes
        Times of the modules before the first and after the last layer.
    free_bytes : int or None
        Free memory during the measurement that other devices of the cluster do not claim; a limit, if any, is in `device`.
    measured_watts : float or None
        Mean power during the measurement; ``None`` if the machine does not report it.
    power_source : str
        What measured the power, or why nothing did; empty if it was not requested.
    environment : Environment or None
        What its worker computes with; ``None`` if no worker was asked.
    rounding : Rounding or None
        How it rounds in the model's dtype, and what a row's bits depend on; ``None`` if no worker was asked.

    Raises
    ------
    ArgumentError
        If `measured_watts` is not positive and finite, or `free_bytes` are negative.
    """

    device: Device
    hardware: str
    layers: tuple[ModuleTimes, ...]
    stage: ModuleTimes
    prologue: ModuleTimes
    epilogue: ModuleTimes
    free_bytes: int | None = None
    measured_watts: float | None = None
    power_source: str = ""
    environment: Environment | None = None
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        if self.free_bytes is not None and not 0 <= self.free_bytes <= MOST:
            raise ArgumentError(f"free_bytes={self.free_bytes!r} of device {self.device.name!r} must not be negative")
        if self.measured_watts is not None and not 0 < self.measured_watts < math.inf:
            raise ArgumentError(
                f"measured_watts={self.measured_watts!r} of device {self.device.name!r} must be positive and finite"
            )

    @property
    def watts(self) -> float | None:
        """Power while computing: `Device.watts` if given, else the measured power; ``None`` if neither is known."""
        return self.measured_watts if self.device.watts is None else self.device.watts

    @property
    def capacity_bytes(self) -> float:
        """Memory to plan with: the limit or the free memory, whichever is less; infinite if neither is known."""
        known = [each for each in (self.device.memory_bytes, self.free_bytes) if each is not None]
        return min(known, default=math.inf)

    def whole_step_s(self, model: ModelProfile, *, is_decode: bool) -> tuple[float, float]:
        """Return seconds and spread of the largest measured step, with all layers on this device."""
        shapes = [each for each in self.layers[0].steps if (each.tokens == 1) == is_decode] or self.layers[0].steps
        rows, tokens, context = max((each.rows, each.tokens, each.context) for each in shapes)
        parts = [(times, model.kind_of_layer.count(kind)) for kind, times in enumerate(self.layers)]
        parts += [(times, 1) for times in (self.stage, self.prologue, self.epilogue)]
        seconds = spread_s = 0.0
        for times, count in parts:
            seconds += count * times.seconds(rows, tokens, context)
            same = [each for each in times.steps if (each.rows, each.tokens, each.context) == (rows, tokens, context)]
            spread_s += count * sum(each.spread_s for each in same)
        return seconds, spread_s


@dataclasses.dataclass(frozen=True, kw_only=True)  # no slots: look-ups are kept
class Profile(Shown):
    """A model measured on the devices and links of a cluster.

    Parameters
    ----------
    model : ModelProfile
        The model.
    devices : tuple of DeviceProfile
        Every device, each once.
    links : tuple of LinkProfile
        Every link between two devices, and between each device and the caller, in both directions.
    versions : dict of str to str
        Versions of the caller's libraries; empty if times are estimated rather than measured.
    doubt : str
        Why the measured times are doubtful; empty if they are not. A doubtful profile is not kept on disk.

    Raises
    ------
    ArgumentError
        If there is no device, a name occurs twice, times of a kind of layer are missing, or a link is missing or names an
        unknown device.
    """

    model: ModelProfile
    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...]
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    doubt: str = ""

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise ArgumentError("devices of a profile are empty: give at least one")
        for name in names:
            if names.count(name) > 1:
                raise ArgumentError(f"devices of a profile hold {name!r} twice: names must differ")
        for each in self.devices:
            if len(each.layers) != len(self.model.kinds):
                raise ArgumentError(
                    f"layers of device {each.device.name!r} are of {count_text(len(each.layers), 'kind')}, "
                    f"but the model has {len(self.model.kinds)}"
                )
        known = {(link.source, link.target) for link in self.links}
        for source, target in sorted(known):
            for name in (source, target):
                if name not in (CALLER, *names):
                    raise ArgumentError(f"a link connects {source!r} with {target!r}, but there is no device {name!r}")
        for source in (CALLER, *names):
            for target in (CALLER, *names):
                if source != target and (source, target) not in known:
                    raise ArgumentError(
                        f"the link from {source!r} to {target!r} is missing in a profile: give all links"
                    )

    @functools.cached_property
    def _by_name(self) -> dict[str, DeviceProfile]:
        return {each.device.name: each for each in self.devices}

    @functools.cached_property
    def _by_ends(self) -> dict[tuple[str, str], LinkProfile]:
        return {(each.source, each.target): each for each in self.links}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the devices."""
        return tuple(each.device.name for each in self.devices)

    @property
    def environments(self) -> Environments:
        """What the workers compute with, of the devices that have been measured."""
        return {each.device.name: each.environment for each in self.devices if each.environment is not None}

    def device(self, name: str) -> DeviceProfile:
        """Return the profile of one device.

        Raises
        ------
        ArgumentError
            If there is none of that name.
        """
        found = self._by_name.get(name)
        if found is not None:
            return found
        raise ArgumentError(f"no device {name!r} in this profile: it has {list(self.names)}")

    def link(self, source: str, target: str) -> LinkProfile:
        """Return the profile of one link.

        Raises
        ------
        ArgumentError
            If there is none.
        """
        found = self._by_ends.get((source, target))
        if found is not None:
            return found
        raise ArgumentError(f"no link from {source!r} to {target!r} in this profile")

    def without(self, *names: str) -> Profile:
        """Return the profile without some devices, for example to plan without them."""
        for name in names:
            self.device(name)
        return dataclasses.replace(
            self,
            devices=tuple(each for each in self.devices if each.device.name not in names),
            links=tuple(each for each in self.links if each.source not in names and each.target not in names),
        )

    def with_copy(self, name: str, new_name: str) -> Profile:
        """Return the profile with a copy of a device, for example to see what a second one would gain."""
        like = self.device(name)
        copy = dataclasses.replace(like, device=dataclasses.replace(like.device, name=new_name))
        links = [
            dataclasses.replace(
                each,
                source=new_name if each.source == name else each.source,
                target=new_name if each.target == name else each.target,
            )
            for each in self.links
            if name in (each.source, each.target)
        ]
        # The link between the two is like the fastest link of the device.
        between = [self.link(name, other) for other in self.names if other != name] or [self.link(name, CALLER)]
        best = min(between, key=lambda link: (link.latency_s, -(link.bandwidth_bytes_per_s or math.inf)))
        links += [
            dataclasses.replace(best, source=source, target=target)
            for source, target in ((name, new_name), (new_name, name))
        ]
        return dataclasses.replace(self, devices=(*self.devices, copy), links=(*self.links, *links))

    def to_json(self) -> str:
        """Return the profile as JSON text."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Read a profile that `to_json` wrote.

        Raises
        ------
        ArgumentError
            If the text is not a profile.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ArgumentError(f"not the JSON of a profile: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a file, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_file(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile from a file.

        Raises
        ------
        ArgumentError
            If there is no such file, or it holds no profile.
        """
        try:
            return cls.from_json(Path(path).read_bytes())
        except OSError as error:
            raise ArgumentError(f"no profile at {os.fspath(path)!r}: {error}") from error

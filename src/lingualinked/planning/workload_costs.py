"""From a profile and a workload to the numbers of a placement problem, and to seconds and bytes of single stages.

Knows profiles and workloads; nothing is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lingualinked.device import CALLER
from lingualinked.errors import ArgumentError
from lingualinked.module_times import ModuleTimes
from lingualinked.planning.placement.problem import Flags, Floats, Problem
from lingualinked.planning.placement.shortcuts import ShortcutCosts, Shortcuts
from lingualinked.profile import DeviceProfile, ModelProfile, Profile
from lingualinked.transmission import ID_BYTES
from lingualinked.workload import Workload

HEADER_BYTES = 160
"""Bytes of a step's message besides its tensors, about."""

_OVERFLOWING = 1e100  # seconds or watts, beyond which their products and sums may exceed every float
_KV_GRANULE_TOKENS = 64


class WorkloadCosts:
    """What a profile says a workload costs, with a share of every device's memory left free."""

    def __init__(self, profile: Profile, workload: Workload, reserve: float, *, num_overlapping: int = 1) -> None:
        self.profile = profile
        self.num_overlapping = num_overlapping  # stages that chunks of a prompt are taken to be in at the same time
        self.workload = profile.model.fit_workload(workload)
        self.reserve = reserve

    def decode_s(self, device: DeviceProfile, start: int, end: int) -> float:
        """Seconds of a decode step at the workload's mean context in the stage of layers ``[start, end)``."""
        return self._stage_s(device, start, end, 1, self.workload.mean_context)

    def prefill_s(self, device: DeviceProfile, start: int, end: int) -> tuple[float, ...]:
        """Seconds of each chunk of a microbatch's prefill in the stage of layers ``[start, end)``; only the last has logits."""
        seconds = [self._stage_s(device, start, end, *chunk) for chunk in self.workload.chunks]
        if end == self.profile.model.num_layers:
            *others, _ = self.workload.chunks
            rows = self.workload.step_rows
            after = [device.epilogue.seconds(rows, *chunk) for chunk in others]
            seconds = [max(0.0, each - more) for each, more in zip(seconds, [*after, 0.0], strict=True)]
        return tuple(seconds)

    def mean(self, prefill: float, decode: float) -> float:
        """Mean over the steps of a request: one prefill, which gives the first token, and a decode step per further one."""
        return (prefill + (self.workload.new_tokens - 1) * decode) / self.workload.new_tokens

    def hop_bytes(self, source: str, target: str, tokens: int) -> float:
        """Bytes that a step of so many new tokens sends from one party to another."""
        model, rows = self.profile.model, self.workload.step_rows
        if source == CALLER:
            return HEADER_BYTES + rows * tokens * ID_BYTES
        if target == CALLER:
            return HEADER_BYTES + rows * model.logits_bytes  # of the last position alone
        return HEADER_BYTES + rows * tokens * model.hidden_bytes

    def prefill_transfer_s(self, source: str, target: str) -> tuple[float, ...]:
        """Seconds in which each chunk of a prefill keeps a link busy; to the caller, only the last is sent."""
        sent = [self.transfer_s(source, target, tokens) for tokens, _ in self.workload.chunks]
        return tuple([0.0] * (len(sent) - 1) + sent[-1:]) if target == CALLER else tuple(sent)

    def transfer_s(self, source: str, target: str, tokens: int) -> float:
        """Seconds in which a step keeps a link busy."""
        return self.profile.link(source, target).transfer_s(self.hop_bytes(source, target, tokens))

    def hop_s(self, source: str, target: str, tokens: int) -> float:
        """Seconds from one party to another."""
        return self.profile.link(source, target).latency_s + self.transfer_s(source, target, tokens)

    def layer_kv_bytes(self, layer: int) -> int:
        """Bytes of a layer's KV and state of all sessions in flight, as buffers will have grown by the end."""
        model = self.profile.model
        capacity = kv_capacity(self.workload, model.layer_windows[layer])
        return (model.layer_kv_bytes[layer] * capacity + model.layer_state_bytes[layer]) * self.workload.num_rows

    def kv_bytes(self, start: int, end: int) -> int:
        """Bytes of the KV of layers ``[start, end)``."""
        return sum(map(self.layer_kv_bytes, range(start, end)))

    def working_bytes(self) -> int:
        """Bytes of intermediate results of the largest step."""
        model, rows = self.profile.model, self.workload.step_rows
        return rows * (self.workload.prompt_tokens * model.working_bytes + model.logits_bytes)

    def capacity_bytes(self, device: DeviceProfile) -> float:
        """Bytes that may be planned with on a device."""
        return (1 - self.reserve) * device.capacity_bytes

    def problem(self) -> Problem:
        """Put everything into the numbers of a placement problem."""
        model, devices = self.profile.model, self.profile.devices
        names = self.profile.names
        any_trusted = any(each.device.trusted for each in devices)
        trusted = np.array([each.device.trusted or not any_trusted for each in devices])
        closing = np.array([each.device.trusted for each in devices])
        self.workload.check_trusted(any_trusted=any_trusted)
        front, back = self.workload.trusted_layers

        def per_device(part: str) -> Floats:
            return np.array([self._mean_s(getattr(each, part)) for each in devices])

        chunks = self.workload.chunks

        def hops(busy: bool) -> Floats:
            between = self._mean_busy_s if busy else self._mean_hop_s
            return np.array([[0.0 if a == b else between(a, b) for b in names] for a in names])

        kinds = np.array([[self._mean_s(times) for times in each.layers] for each in devices])
        layer_bytes = [weight + self.layer_kv_bytes(i) for i, weight in enumerate(model.layer_weight_bytes)]
        stage_bytes = float(self.working_bytes() + model.everywhere_bytes)
        problem = Problem(
            names=names,
            layer_s=kinds[:, list(model.kind_of_layer)],
            stage_s=per_device("stage"),
            first_s=per_device("prologue"),
            last_s=np.array([self._mean_s(each.epilogue, chunks[-1:]) for each in devices]),
            hop_s=hops(False),
            busy_s=hops(True),
            enter_s=np.array([self._mean_hop_s(CALLER, name) for name in names]),
            enter_busy_s=np.array([self._mean_busy_s(CALLER, name) for name in names]),
            leave_s=np.array([self._mean_hop_s(name, CALLER) for name in names]),
            leave_busy_s=np.array([self._mean_busy_s(name, CALLER) for name in names]),
            layer_bytes=np.array(layer_bytes, dtype=float),
            stage_bytes=np.full(len(names), stage_bytes),
            first_bytes=float(model.prologue_bytes),
            last_bytes=float(model.epilogue_bytes),
            tied_bytes=float(model.tied_bytes),
            capacity_bytes=np.array([self.capacity_bytes(each) for each in devices]),
            may_be_first=trusted,
            may_be_last=trusted,
            may_close=closing,
            watts=np.array([math.nan if each.watts is None else each.watts for each in devices]),
            num_sessions=self.workload.steps_in_flight,
            num_front=min(max(1, front), model.num_layers),
            num_back=min(max(1, back), model.num_layers),
            forbidden_cuts=model.transmission.forbidden_cuts,
            shortcuts=self._shortcuts(trusted),
        )
        _check_magnitude(problem)
        return problem

    def shortcut_transfer_s(self, source: str, target: str, token_bytes: int, tokens: int) -> float:
        """Seconds in which a tensor of so many bytes per row and token, in a step, keeps a link busy."""
        return self.profile.link(source, target).transfer_s(self.workload.step_rows * tokens * token_bytes)

    def _shortcuts(self, trusted: Flags) -> Shortcuts | None:
        """Return what tensors that skip stages cost; ``None`` if there are none."""
        shortcuts = self.profile.model.transmission.shortcuts
        if not shortcuts:
            return None
        costs = tuple(
            ShortcutCosts(
                made_at=shortcut.made_at,
                used_at=shortcut.used_at,
                send_s=self._shortcut_s(shortcut.token_bytes),
                shows_text=shortcut.shows_text,
            )
            for shortcut in shortcuts
        )
        anywhere = np.ones(len(trusted), dtype=bool)
        makers = {shortcut.made_at: trusted if shortcut.made_at == 0 else anywhere for shortcut in shortcuts}
        return Shortcuts(costs=costs, makers=makers)

    def _shortcut_s(self, token_bytes: int) -> Floats:
        """Return the seconds of a mean step in which each link carries a tensor, float64 ``[D, D]``."""

        def seconds(source: str, target: str) -> float:
            sent = [self.shortcut_transfer_s(source, target, token_bytes, tokens) for tokens, _ in self.workload.chunks]
            prefill = min(sent[0], sent[-1]) if self.num_overlapping > 1 else sum(sent)
            return self.mean(prefill, self.shortcut_transfer_s(source, target, token_bytes, 1))

        names = self.profile.names
        return np.array([[0.0 if a == b else seconds(a, b) for b in names] for a in names])

    def _stage_s(self, device: DeviceProfile, start: int, end: int, tokens: int, context: float) -> float:
        return stage_s(self.profile.model, device, start, end, self.workload.step_rows, tokens, context)

    def _mean_s(self, times: ModuleTimes, chunks: Sequence[tuple[int, int]] | None = None) -> float:
        rows, chunks = self.workload.step_rows, self.workload.chunks if chunks is None else chunks
        prefill = self._overlapped([times.seconds(rows, *chunk) for chunk in chunks])
        return self.mean(prefill, times.seconds(rows, 1, self.workload.mean_context))

    def _mean_hop_s(self, source: str, target: str) -> float:
        transfers_s = self.prefill_transfer_s(source, target)
        prefill = sum(transfers_s)
        if self.num_overlapping > 1:
            prefill = transfers_s[-1] if target == CALLER else min(transfers_s[0], transfers_s[-1])
        return self.profile.link(source, target).latency_s + self.mean(prefill, self.transfer_s(source, target, 1))

    def _mean_busy_s(self, source: str, target: str) -> float:
        return self.mean(sum(self.prefill_transfer_s(source, target)), self.transfer_s(source, target, 1))

    def _overlapped(self, chunks_s: Sequence[float]) -> float:
        """Return the least that a part adds to a prompt's way, on the mean over the stages that all chunks may be followed in."""
        shortest = min(chunks_s[0], chunks_s[-1])
        return shortest + (sum(chunks_s) - shortest) / self.num_overlapping


def _check_magnitude(problem: Problem) -> None:
    """Refuse times and powers whose sums and products would overflow."""
    compute = (problem.layer_s.max(axis=1), problem.stage_s, problem.first_s, problem.last_s)
    for what, figures in (
        ("seconds of compute", np.max(compute, axis=0)),
        ("seconds from and to the caller", np.maximum(problem.enter_s, problem.leave_s)),
        ("seconds to the next device", problem.hop_s.max(axis=1)),
        ("watts", np.nan_to_num(problem.watts, posinf=math.inf)),
    ):
        for name, figure in zip(problem.names, figures.tolist(), strict=True):
            if not figure < _OVERFLOWING:
                raise ArgumentError(
                    f"the {what} of device {name!r} are {figure:g}, and must be less than {_OVERFLOWING:g}: correct the "
                    "speed, link or power that is stated for it, or plan for fewer tokens"
                )


def stage_s(
    model: ModelProfile, device: DeviceProfile, start: int, end: int, rows: int, tokens: int, context: float
) -> float:
    """Seconds of compute of a step of some shape in the stage of layers ``[start, end)``."""
    kinds = model.kind_of_layer[start:end]
    seconds = sum(kinds.count(kind) * device.layers[kind].seconds(rows, tokens, context) for kind in set(kinds))
    seconds += device.stage.seconds(rows, tokens, context)
    if start == 0:
        seconds += device.prologue.seconds(rows, tokens, context)
    if end == model.num_layers:
        seconds += device.epilogue.seconds(rows, tokens, context)
    return seconds


def kv_capacity(workload: Workload, window: int | None) -> int:
    """Return the tokens per row that a layer's KV has room for at the end of an answer.

    ``generate`` says how many tokens may come, and room is made for them and for no more (`model/kv/growing_tensor.py`). A sliding
    window's layer holds a window, and new tokens until what has left the window makes way.
    """
    if window is None:
        return _granules(workload.num_tokens)
    return _granules(min(workload.num_tokens, window + workload.new_tokens, 2 * window))


def _granules(num_tokens: int) -> int:
    return -(-num_tokens // _KV_GRANULE_TOKENS) * _KV_GRANULE_TOKENS

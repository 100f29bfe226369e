"""Runs the hooks of submodules, and what replaces their forward, in the thread that called the model, when a stage gets there.

Torch calls them itself: a module is called here with a forward that waits for the stage's. Knows modules and one step's events.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor

from lingualinked.cluster.steps.step_reply import StepReply
from lingualinked.errors import ProtocolError, UnsupportedOperationError, WorkerError
from lingualinked.model.hooks.hook_data import HookPoint, Items
from lingualinked.model.hooks.hook_points import contains_layers
from lingualinked.sharded.hooks.hook_calls import HookCall, has_same_bits
from lingualinked.sharded.sealed.sealing import call_hooks_around

if TYPE_CHECKING:
    from torch import nn

    from lingualinked.cluster.steps.hooked_step import HookedStep
    from lingualinked.cluster.steps.step_reply import HookEvent
    from lingualinked.model.hooks.hook_data import Cut, HookValue
    from lingualinked.model.stages.layer_skips import LayerSkips
    from lingualinked.sharded.calling.cache import ShardedCache
    from lingualinked.sharded.calling.gradients import StepGradients
    from lingualinked.sharded.hooks.hooked_modules import HookedModules
    from lingualinked.sharded.hooks.recording_order import RecordingOrder

_TOKENS = ("input_ids", "inputs_embeds")  # what a module that runs all layers needs in its first stage alone


class _NotAwaited(BaseException):
    """Nobody awaits the output of a module: hooks that another thread registers meanwhile would be called without one."""


class _Part(NamedTuple):
    """The part of a call that hooks want: what they may read, if they want that, and what they may replace."""

    call: HookCall
    cut: Cut
    given: Tensor | None
    value: Tensor


class CallerHooks:
    """The hooks of one step of a model; see `lingualinked.cluster.steps.hooked_step.StepHooks`."""

    def __init__(
        self,
        modules: HookedModules,
        cache: ShardedCache,
        given: dict[str, Any],
        gradients: StepGradients | None,
        recording: RecordingOrder | None,
    ) -> None:
        self._modules = modules
        self._recording = recording  # of a step that records outputs
        self._cache = cache
        self._gradients = gradients
        self._given = given  # arguments that stages replace by their own
        self._outputs: dict[str, list[tuple[int, Any]]] = {}  # of modules that every stage runs, with the first stage
        self._num_calls: Counter[tuple[str, int]] = Counter()
        self._states: dict[int, Tensor] = {}  # behind layers whose hooks run once these are recorded
        self._step: HookedStep

    def points(self) -> tuple[HookPoint, ...]:
        """Return where the step has to stop."""
        points = self._modules.points()
        if self._gradients is not None and self._gradients.flow:
            points = tuple(map(_stop_twice, points))
        return points if self._recording is None else self._modules.in_order(points, self._recording)

    def run(self, step: HookedStep) -> StepReply:
        """Run the hooks of a step as it reaches them; return its reply."""
        self._step = step
        try:
            return cast("StepReply", self._serve_events(None))
        except BaseException:
            step.abandon()
            raise
        finally:
            del self._step

    def _serve_events(self, awaited: str | None) -> HookEvent | StepReply:
        """Run hooks until the output comes of a module that is running, or else the reply."""
        while True:
            event = self._step.next_event()
            if isinstance(event, StepReply):
                if awaited is not None:
                    error = ProtocolError(f"a step ended before the output of {awaited} came, which has hooks")
                    raise WorkerError(self._step.spans[-1][0], f"ProtocolError: {error}") from error
                return event
            message = event.message
            try:
                if not self._modules.may_stop(message.path, self._step.spans, message.stage, is_done=message.is_done):
                    raise ProtocolError(f"a step stopped at {message.path!r}, which stage {message.stage} does not run")
                part = self._receive_part(event) if message.is_cut else None
            except ProtocolError as error:
                raise WorkerError(event.device, f"ProtocolError: {error}") from error
            if part is not None:
                self._run_narrow_hooks(part, is_done=message.is_done)
                continue
            try:
                if message.args is None or message.kwargs is None or message.is_done != (message.output is not None):
                    if message.path != awaited or message.output is None:
                        raise ProtocolError(f"a step stopped at {message.path}, which is not running")
                    return event
                call = HookCall(message.path, message.stage)
                call.receive(message, event.tensors, self._cache, self._gradients)
                args, kwargs, output = map(
                    call.values.rebuild, (message.args, message.kwargs, message.output or Items(False, ()))
                )
                if type(args) is not tuple or type(kwargs) is not dict or not all(type(name) is str for name in kwargs):
                    raise ProtocolError(f"{message.path} was called with something else than arguments")
            except ProtocolError as error:
                raise WorkerError(event.device, f"ProtocolError: {error}") from error
            self._run_hooks(call, args, kwargs, output, is_done=message.is_done)

    def _run_hooks(
        self, call: HookCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, is_done: bool
    ) -> None:
        """Call a module's hooks; before it has run, the stage runs on until its output comes."""
        path, runs = call.path, is_done
        is_everywhere = self._modules.runs_everywhere(path)
        if contains_layers(path, self._modules.layers) and not is_done:
            kwargs = {name: self._given.get(name, value) for name, value in kwargs.items()}
        earlier = self._earlier_output(call) if is_everywhere else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal call, output, runs
            waits, runs = self._modules.stops_after(path), True
            self._answer_inputs(call, args, kwargs, waits=waits)
            if not waits:
                raise _NotAwaited
            event = cast("HookEvent", self._serve_events(path))
            if event.message.stage != call.stage:  # of a module that runs all layers
                call = HookCall(path, event.message.stage)
            try:
                call.receive(event.message, event.tensors, self._cache, self._gradients)
                output = call.values.rebuild(cast("HookValue", call.output))
            except ProtocolError as error:
                raise WorkerError(event.device, f"ProtocolError: {error}") from error
            self._keep_state(path, output)
            return output

        if earlier is not None:
            if not is_done:
                forward(*args, **kwargs)
            (result,) = earlier
        elif is_done:
            self._keep_state(path, output)
            result = _call_hooks_behind(self._modules.by_path[path], args, kwargs, output)
        else:
            try:
                result = call_hooks_around(self._modules.by_path[path], forward, args, kwargs)
            except _NotAwaited:
                return
        if not runs and contains_layers(path, self._modules.layers):
            raise UnsupportedOperationError(
                f"forward of {path} of a sharded model was replaced by a function that does not call the module's own: its "
                "layers are in several stages; skip the layers, or call it"
            )
        if is_everywhere:
            self._num_calls[path, call.stage] += 1
            if earlier is None:
                self._outputs.setdefault(path, []).append((call.stage, result))
        layer = self._modules.layer_at(path)
        if layer in self._states and (result[0] if isinstance(result, tuple) else result) is self._states[layer]:
            del self._states[layer]  # it is recorded in the stage, with what later hooks change in place
        described = call.describe(result)  # if the module has not run, of what it would have returned
        self._answer(call, output=None if described == call.output else described)

    def _keep_state(self, path: str, output: Any) -> None:
        """Keep what a layer returns if it is to be recorded without what its hooks make of it."""
        layer = self._modules.layer_at(path)
        if layer is not None and any(point.path == path and point.behind_records for point in self._step.points):
            self._states[layer] = output[0] if isinstance(output, tuple) else output  # with changes in place, as there

    def restore_states(self, states: tuple[Tensor | None, ...], skips: LayerSkips) -> tuple[Tensor | None, ...]:
        """Return recorded hidden states, which are the inputs of layers, as they were before such hooks changed them."""
        before = {skips.num_before(layer) + 1: state for layer, state in self._states.items()}
        last = len(states) - 1  # what the model returns
        return tuple(
            before[index] if index in before and state is not None and index < last else state
            for index, state in enumerate(states)
        )

    def _receive_part(self, event: HookEvent) -> _Part:
        """Check and return the part of a call that its hooks want."""
        message = event.message
        point = next((each for each in self._step.points if each.path == message.path), None)
        cut = None if point is None else point.cut_after if message.is_done else point.cut_before
        call = HookCall(message.path, message.stage)
        call.receive(message, event.tensors, self._cache, self._gradients)
        given, value = (each and call.values.rebuild(each) for each in (message.args, message.output))
        if cut is None or not isinstance(value, Tensor) or isinstance(given, Tensor) != cut.with_input:
            raise ProtocolError(f"a step stopped at {message.path} with another part of its call than hooks want")
        return _Part(call, cut, cast("Tensor | None", given), value)

    def _run_narrow_hooks(self, part: _Part, *, is_done: bool) -> None:
        """Call the hooks that want a part of a call, each with what the one before has made of it."""
        call, value = part.call, part.value
        for hook in self._modules.narrow_hooks(call.path, part.cut, is_done=is_done):
            value = hook.call_function(value, part.given if hook.wants_both else None)
        described = call.describe(value)
        self._answer(call, output=None if described == call.output else described)

    def _earlier_output(self, call: HookCall) -> tuple[Any] | None:
        """Return the output of the same call in an earlier stage, whose hooks have run there."""
        outputs = self._outputs.get(call.path, [])
        number = self._num_calls[call.path, call.stage]
        return (outputs[number][1],) if number < len(outputs) and outputs[number][0] != call.stage else None

    def _answer_inputs(self, call: HookCall, args: tuple[Any, ...], kwargs: dict[str, Any], *, waits: bool) -> None:
        if contains_layers(call.path, self._modules.layers):
            args, kwargs = _merge_tokens(call, args, kwargs, self._given)
        described = call.describe(args), call.describe(kwargs)
        new_args, new_kwargs = (
            None if new == old else new for new, old in zip(described, (call.args, call.kwargs), strict=True)
        )
        self._answer(call, args=new_args, kwargs=new_kwargs, waits_for_output=waits)

    def _answer(self, call: HookCall, **changes: Any) -> None:
        changed, tensors, strides = call.take_changes(is_last=not changes.get("waits_for_output", False))
        if self._gradients is not None:
            changes["requires_grad"] = call.take_gradients(changed, self._gradients)
        self._step.answer(tensors, self.points(), changed=changed, strides=strides, **changes)


def _stop_twice(point: HookPoint) -> HookPoint:
    """Make a step with gradients stop before a module too if hooks behind it are given its input, whose gradient may be asked for."""
    cut = point.cut_after
    if not point.after or (cut is not None and (cut.positions is not None or not cut.with_input)):
        return point
    return HookPoint(point.path, before=True, after=True, may_skip=point.may_skip)


def _call_hooks_behind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Call the hooks behind a module as torch does; it had no others when it was called."""
    takes_kwargs = module._forward_hooks_with_kwargs  # noqa: SLF001 - torch's own calls those before a module too
    for number, hook in list(module._forward_hooks.items()):  # noqa: SLF001
        result = hook(module, args, kwargs, output) if number in takes_kwargs else hook(module, args, output)
        output = output if result is None else result
    return output


def _merge_tokens(call: HookCall, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
    """Return the inputs of a module that runs all layers as its first stage is to use them: with other tokens, if at all.

    Refuse other changes, which would have to reach all stages.
    """
    old_args, old_kwargs = map(call.values.rebuild, cast("tuple[HookValue, HookValue]", (call.args, call.kwargs)))
    shown = {name: given.get(name, value) for name, value in old_kwargs.items()}
    before: dict[Any, Any] = {**dict(enumerate(old_args)), **shown}
    after: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    known = {id(tensor): copy for tensor, copy in zip(call.values.tensors, call.known, strict=False)}
    for name in (before.keys() | after.keys()) - {0, *_TOKENS}:
        old, new = before.get(name), after.get(name)
        is_edited = isinstance(old, Tensor) and not has_same_bits(old, known[id(old)])
        if is_edited or (old is not new and call.describe(old) != call.describe(new)):
            raise UnsupportedOperationError(
                f"a pre-hook of {call.path} changed {name}, which the stages of its layers have already: "
                "pass it to the model itself, or hook the layers"
            )
    merged = {name: after.get(name, value) for name, value in old_kwargs.items() if name in _TOKENS}
    return (*args[:1], *old_args[1:]), {**old_kwargs, **merged}

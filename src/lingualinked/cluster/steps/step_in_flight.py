"""A step that a session has sent, until its answer has been checked: what was asked, and what is due.

Knows one step and its answer; neither KV nor the other steps of its session.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from typing import TYPE_CHECKING, cast

import torch

from lingualinked.cluster.messaging.pending import result_of
from lingualinked.cluster.steps.captured import join_captured
from lingualinked.cluster.steps.hooked_step import HookedStep
from lingualinked.cluster.steps.recorded import DueRecords, Recorded
from lingualinked.cluster.steps.step_reply import StepReply, check_reply, sample_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lingualinked.cluster.messaging.engine import Engine
    from lingualinked.cluster.plans.route import Route
    from lingualinked.cluster.runs.run_request import RunRequest
    from lingualinked.cluster.steps.captured import ExpectedValue, StepInstruments
    from lingualinked.cluster.steps.hooked_step import StepHooks
    from lingualinked.cluster.steps.remote_graph import GraphUser
    from lingualinked.cluster.steps.step_extras import StepExtras
    from lingualinked.model.adapters.adapter_data import AdapterUse
    from lingualinked.model.spec import ModelSpec
    from lingualinked.protocol.steps import Step
    from lingualinked.telemetry.samples import StepSample

MOST_TOKENS_AHEAD = 8192
"""Row-tokens of one session that may be in flight when another step starts: their hidden states wait in the workers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """What a step does beside computing logits.

    ``keeps_kv`` tells whether later steps follow; ``records`` what layers record (`protocol.steps.RECORDS`),
    ``hidden_state_indices`` which hidden states, if not all. For ``gradients``, the stages keep the step's autograd graph.
    Without ``wants_logits``, as in a chunk of a prompt before the last one, the logits are of no tokens. ``num_tokens_ahead`` are the
    tokens per row that later steps bring and for which there must be room before this one runs. With ``run``, the stages go on with
    the tokens that they choose, if that is possible: the step is then a `RunInFlight`. ``extras`` are further arguments of the
    model's forward.
    """

    keeps_kv: bool = True
    wants_logits: bool = True
    num_tokens_ahead: int = 0
    records: tuple[str, ...] = ()
    hidden_state_indices: tuple[int, ...] | None = None
    hooks: StepHooks | None = None
    instruments: StepInstruments | None = None
    gradients: GraphUser | None = None
    adapters: AdapterUse | None = None
    run: RunRequest | None = None
    extras: StepExtras | None = None

    def of_chunk(self, num_ahead: int, *, is_observed: bool) -> StepOptions:
        """Return those of a chunk behind which others come; it computes logits only if anybody sees what it returns."""
        is_observed |= bool(self.records or self.hooks or self.instruments or self.gradients)
        return dataclasses.replace(self, num_tokens_ahead=num_ahead, wants_logits=is_observed)


class StepInFlight:
    """A step on its way through the stages; the thread that has started it calls ``finish``, once."""

    def __init__(
        self,
        step: Step,
        route: Route,
        inputs: Tensor,
        logits_to_keep: int | Tensor,
        num_past: int,
        options: StepOptions,
        due: Mapping[int, ExpectedValue],
        finish: Callable[[StepInFlight], tuple[Tensor, Recorded]],
    ) -> None:
        self.options = options
        self.num_rows, self.num_new = inputs.shape[:2]
        self._step = step
        self._route = route
        self._inputs = inputs
        self._logits_to_keep = logits_to_keep
        self._num_past = num_past
        self._due = due
        self._finish = finish
        self._answers: list[concurrent.futures.Future[object]] = []  # no frame that an error passes may name it
        self._hooked: HookedStep | None = None
        self._reply: StepReply
        self._began_s = time.monotonic()
        self._answered_s: list[float] = []  # when the answer came, which may be long before anybody asks for it

    def send(
        self, engine: Engine, tensors: tuple[Tensor, ...], timeout_s: float, on_failure: Callable[[], None]
    ) -> None:
        """Send it to the first stage; ``on_failure`` is called as soon as it has failed in the middle of its hooks."""
        if self.options.hooks is None:
            self._answers.append(engine.step(self._route.stage_devices, self._step, tensors, timeout_s))
            answered_s = self._answered_s
            self._answers[0].add_done_callback(lambda _: answered_s.append(time.monotonic()))
        else:
            self._hooked = HookedStep(engine, self._step, self._route, on_failure)
            self._hooked.start(tensors, timeout_s)

    @property
    def no_logits(self) -> tuple[Tensor, Recorded]:
        """What a step that wants no logits gives: logits of no tokens, and nothing recorded."""
        return torch.empty(self.num_rows, 0, 0), {}

    def finish(self) -> tuple[Tensor, Recorded]:
        """Wait for the answer; return the logits, ``[rows, kept tokens, vocabulary]``, and what was recorded.

        Raises what `Session.step` does.
        """
        return self._finish(self)

    def receive(
        self, spec: ModelSpec, vocabulary: int | None, max_cache_len: int, trusted: frozenset[str]
    ) -> tuple[Tensor, Recorded]:
        """Wait for the answer, run the hooks meanwhile, and check it."""
        hooks, instruments = self.options.hooks, self.options.instruments
        if hooks is None:
            self._reply = cast("StepReply", result_of(self._answers.pop()))
        else:
            assert self._hooked is not None
            self._reply = hooks.run(self._hooked)
        due = self._inputs, self._logits_to_keep, vocabulary
        logits = check_reply(self._reply, self._route.stage_devices, *due, wants_logits=self.options.wants_logits)
        recorded: Recorded = {}
        if self.options.records or self._due:
            num_tokens = self._num_past + self.num_new
            records_due = DueRecords.of(self._step, spec, self._inputs, num_tokens, max_cache_len)
            recorded = records_due.join(self._reply.parts, self._route)
        if self._due and instruments is not None:
            skipped = () if self._step.skips is None else self._step.skips.indices
            values = join_captured(self._due, self._reply.parts, self._route, self._step.session, skipped)
            instruments.collect(values, trusted)
        return logits, recorded

    def report_gradients(self) -> bool:
        """Tell those who asked for gradients what the answer says of them; return whether gradients flow."""
        gradients = self.options.gradients
        if gradients is None:
            return False
        gradients.logits_require_grad, gradients.ends_at_tap = self._reply.requires_grad, self._reply.ends_at_tap
        return gradients.flow

    def sample(self) -> StepSample:
        """Return what telemetry keeps of it."""
        shape = self.num_rows, self.num_new, self._num_past
        return sample_of(self._step, self._route, self._reply, self._began_s, *shape, *self._answered_s)

"""Packed steps: new tokens of several sessions in one pass through the stages.

Knows sessions, their routes and the answers; neither how requests are scheduled nor what the tokens mean.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.packed.packed_flight import PackedFlight, PackedPart
from lingualinked.cluster.packed.packed_session import check_session, use_session
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.cluster.weights.tensor_edits import TensorEdits
from lingualinked.errors import ArgumentError, StepTimeoutError, UnsupportedOperationError
from lingualinked.model.adapters.adapter_data import AdapterUse
from lingualinked.model.process.torch_settings import read_torch_settings
from lingualinked.protocol.packed import PackedStep, PackedText
from lingualinked.quantities import count_text
from lingualinked.telemetry.samples import StepSample
from lingualinked.transport.wire.hop_clock import clock_us

_LEAST_ROWS = 2  # one row alone is computed to other bits than one among others
_MOST_ROWS = 16
_MOST_TRIES = 10
_numbers = itertools.count(1)  # of all models, as those of sessions


class PackedSteps:
    """Starts packed steps of one model's sessions, from any thread; any number may be in flight.

    A session may be part of several that are in flight, if the same thread starts them: its parts run in order.
    """

    def __init__(
        self,
        engine: Engine,
        model: int,
        routes: Routes,
        edits: TensorEdits,
        watch: Callable[[StepSample], None],
        timeout_s: float,
        vocabulary: int | None,
        find_reason: Callable[[], str],
        *,
        is_invariant: bool,
    ) -> None:
        self._engine = engine
        self._model = model
        self._routes = routes
        self._changes = edits
        self._watch = watch
        self._timeout_s = timeout_s
        self._vocabulary = vocabulary
        self._find_reason = find_reason
        self._is_invariant = is_invariant
        self._starting = threading.Lock()  # sessions' parts are sent in the order in which they are counted

    @functools.cached_property
    def why_not(self) -> str:
        """Why the model's class can't run packed steps; "" if it can."""
        return self._find_reason()

    def check_supported(self) -> None:
        """Raise UnsupportedOperationError if the model's class can't run packed steps."""
        if self.why_not:
            raise UnsupportedOperationError(f"packed steps are not possible: {self.why_not}")

    def start(self, parts: Sequence[PackedPart], adapters: AdapterUse | None = None) -> PackedFlight:
        """Send the new tokens of several sessions as one step.

        A part that fails, as for lack of room, fails alone, and its reply says why.

        Parameters
        ----------
        parts : sequence of PackedPart
            At least one, of sessions that differ.
        adapters : AdapterUse or None
            The adapters that all parts compute with; ``None``: none.

        Raises
        ------
        ArgumentError
            If parts are not as they must be, or one of the sessions is used by something else.
        UnsupportedOperationError
            If the model's class can't run packed steps.
        StepTimeoutError
            If layers move again and again, so that the sessions have no common route.
        """
        # 1) check what was asked for
        self.check_supported()
        self._check_parts(parts, adapters)
        flight = PackedFlight(parts)
        with self._starting:
            try:
                # 2) use the sessions until the answer has come; none of them moves meanwhile, nor does the model change
                route = self._use_sessions(parts, flight)
                # 3) count their tokens, and send them
                texts, ids = flight.count_tokens()
                if not texts:
                    flight.land(None, self._vocabulary, self._watch)
                    return flight
                step = self._make_step(route, texts, adapters)
                flight.set_sent(step, route)
                answered = self._engine.packed_step(route.stage_devices, step, (ids,), self._timeout_s)
                answered.add_done_callback(lambda done: flight.land(done, self._vocabulary, self._watch))
            except BaseException as error:  # also an interrupt: nobody would end the use of its sessions
                flight.abandon(error)
                raise
        return flight

    def _check_parts(self, parts: Sequence[PackedPart], adapters: AdapterUse | None) -> None:
        if not parts or len({part.session for part in parts}) != len(parts):
            raise ArgumentError(
                f"a packed step of {count_text(len(parts), 'part')} must have one part for each of its sessions"
            )
        for part in parts:
            check_session(part.session, self._model)
            least = 0 if part.choice is None else 1
            if not least <= part.num_logits <= len(part.ids) or not part.ids:
                raise ArgumentError(
                    f"num_logits={part.num_logits} of {count_text(len(part.ids), 'token')}: a part has tokens, and logits of at most all of "
                    "them; with a choice, of one at least"
                )
        if adapters is not None and adapters.rows is not None:
            raise ArgumentError(
                f"adapters by row ({', '.join(map(repr, adapters.rows))}) can't be used in a packed step, whose texts all compute "
                "with the same: start one step for each adapter"
            )

    def _use_sessions(self, parts: Sequence[PackedPart], flight: PackedFlight) -> Route:
        """Keep all sessions in use, on one route."""
        for _ in range(_MOST_TRIES):
            flight.uses.enter_context(self._changes.gate.step(object()))
            routes = {use_session(part.session, flight.uses, self._timeout_s) for part in parts}
            if len(routes) == 1:
                return routes.pop()
            flight.uses.close()  # another target has come into force in between
        raise StepTimeoutError("the sessions of a packed step have no common route: layers move again and again")

    def _make_step(self, route: Route, texts: tuple[PackedText, ...], adapters: AdapterUse | None) -> PackedStep:
        skips = self._changes.skips
        return PackedStep(
            model=self._model,
            plan_version=route.version,
            stage=0,
            number=next(_numbers),
            texts=texts,
            failures=(),
            layout=None,
            sent_us=clock_us(),
            timings=(),
            least_rows=min(_MOST_ROWS, max(_LEAST_ROWS, route.independent_rows)),
            torch_settings=tuple(read_torch_settings().items()),
            adapters=adapters,
            skips=skips if skips.indices else None,
            is_invariant=self._is_invariant,
        )

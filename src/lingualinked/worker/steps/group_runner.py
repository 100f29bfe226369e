"""Runs steps of several sessions that wait for the same stage at the same time, in one pass, and sends their results on.

Knows messages, stages and where results go; not who may send what.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from torch import Tensor

from lingualinked.model.tensor_strides import pack_tensor
from lingualinked.protocol.base import Message
from lingualinked.protocol.steps import StageTimes, Step
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.transport.wire.hop_clock import HopClock, clock_us
from lingualinked.worker.messaging.joined_steps import join_steps
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps.pace import Pace, TimerStart
from lingualinked.worker.steps.runs import Runs
from lingualinked.worker.steps.step_groups import GroupedSteps, may_join
from lingualinked.worker.steps.token_sender import ChosenStep, TokenSender

Waiting = tuple[Step, Delivery]
TakeOthers = Callable[[Callable[[Message, Delivery], bool], int], list[Any]]
"""Returns messages that wait and are accepted, at most so many."""

RunOrReport = Callable[[Callable[[], None], Iterable[Step]], bool]
"""Runs something for some steps and returns whether it has run; tells the caller of each why it failed otherwise."""


class GroupRunner:
    """Runs one group after another."""

    def __init__(
        self,
        mailbox: Mailbox,
        peers: Peers,
        stages: HostedStages,
        pace: Pace,
        runs: Runs,
        hops: HopClock,
        run_or_report: RunOrReport,
    ) -> None:
        self._mailbox = mailbox
        self._peers = peers
        self._stages = stages
        self._pace = pace
        self._runs = runs
        self._hops = hops
        self._run_or_report = run_or_report
        self._tokens = TokenSender(mailbox, peers, runs)

    def gather(self, first: Waiting, take_others: TakeOthers) -> list[Waiting]:
        """Return a step with those that can run together with it, of those that wait."""
        key = _key(first[0])
        hosted = self._stages.find_stage(key)
        if hosted is None:
            return [first]
        sessions = {first[0].session}

        def accepts(message: Message, delivery: Delivery) -> bool:
            if not isinstance(message, Step) or _key(message) != key or message.session in sessions:
                return False
            if message.layout != first[0].layout:  # one of them does not fit the stage, and must fail alone
                return False
            # Asked only now: how many may run together takes half a second to find out, and one session alone never needs it.
            if len(sessions) == 1 and not self._may_join(hosted, *first):
                return False
            if not self._may_join(hosted, message, delivery) or len(sessions) == hosted.most_together:
                return False
            sessions.add(message.session)
            return True

        return [first, *take_others(accepts, _share(hosted) - 1)]

    def _may_join(self, hosted: HostedStage, step: Step, delivery: Delivery) -> bool:
        return may_join(hosted, step, delivery.tensors) and (
            not hosted.stage.is_last or self._runs.find(step) is not None
        )

    def serve(self, group: Sequence[Waiting]) -> None:
        """Run a group that `gather` has found, and send its results on, or tell the caller why they failed."""
        hosted = self._stages.get_stage(_key(group[0][0]))
        # 1) how long each step travelled and waited
        delays = {
            step.session: self._hops.split_delay(
                delivery.sender, step.sent_us, delivery.due_s, delivery.decode_s, same_host=delivery.same_host
            )
            for step, delivery in group
        }
        # 2) find those that can run
        started = self._pace.start_timer()
        grouped = GroupedSteps(hosted)
        ready = [
            (step, delivery)
            for step, delivery in group
            if self._run_or_report(functools.partial(grouped.prepare, step, delivery.tensors), (step,))
        ]
        # 3) run them
        if ready:
            run = functools.partial(self._run, hosted, grouped, ready, delays, started)
            self._run_or_report(run, [step for step, _ in ready])

    def _run(
        self,
        hosted: HostedStage,
        grouped: GroupedSteps,
        ready: Sequence[Waiting],
        delays: Mapping[int, tuple[int | None, int]],
        started: TimerStart,
    ) -> None:
        """Run those that `grouped` has prepared, and send their results on."""
        output = grouped.run()
        # 1) choose their tokens, if this is where
        results = output.tensors[0].split(1, dim=1)
        runs = [self._runs.find(step) for step, _ in ready] if hosted.stage.is_last else []
        tokens = [None if run is None else run.choose(own) for run, own in zip(runs, results, strict=False)]
        elapsed_s = self._pace.finish_timer(started)
        # 2) add this stage's times to each header: a step took as long as all of them together
        codec_us = round(self._mailbox.encode_s / len(ready) * 1e6)
        timings = []
        for step, delivery in ready:
            hosted.record_step(elapsed_s / len(ready))
            hop_us, wait_us = delays[step.session]
            times = StageTimes(
                received_bytes=delivery.num_bytes,
                hop_us=hop_us,
                wait_us=wait_us,
                compute_us=round(elapsed_s * 1e6),
                codec_us=round(delivery.decode_s * 1e6) + codec_us,
            )
            timings.append((*step.timings, times))
        # 3) send tokens to the caller and the first stage, or hidden states to the next one
        steps = [step for step, _ in ready]
        if hosted.stage.is_last:
            chosen = [
                ChosenStep(step, run, own, logits, times)
                for step, run, own, logits, times in zip(steps, runs, tokens, results, timings, strict=True)
                if run is not None
            ]
            hosted.sent_bytes += self._tokens.send(chosen, clock_us())
        else:
            self._send_onward(hosted, steps, timings, results, output.layout)

    def _send_onward(
        self,
        hosted: HostedStage,
        steps: Sequence[Step],
        timings: Sequence[tuple[StageTimes, ...]],
        results: Sequence[Tensor],
        layout: tuple[bool, ...] | None,
    ) -> None:
        sent_us = clock_us()
        onward = []
        for step, times, states in zip(steps, timings, results, strict=True):
            onward_step = msgspec.structs.replace(
                step, stage=step.stage + 1, layout=layout, strides=None, timings=times, sent_us=sent_us
            )
            onward.append((onward_step, states))
        message, tensor = join_steps(onward)
        hosted.sent_bytes += self._peers.send(hosted.next_name, message, (pack_tensor(tensor)[0],))


def _key(step: Step) -> StageKey:
    return StageKey(step.model, step.plan_version, step.stage)


def _share(hosted: HostedStage) -> int:
    """Return how many steps to run together at most, so that the other stages have as many to run meanwhile."""
    num_running = sum(session.run_steps > 0 for session in hosted.sessions.values())
    return max(1, -(-num_running // hosted.num_stages))

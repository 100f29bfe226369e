"""Asks the workers of a session to copy its KV: to another route, or for another session.

Knows routes and messages; not when a session moves.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.plans.route import Route
from lingualinked.protocol.moving import CopyKV, ForkSession, JoinedRows, JoinSessions


@dataclasses.dataclass(frozen=True, slots=True)
class KVRequests:
    """The requests about one session's KV; each returns the futures of the answers."""

    engine: Engine
    model: int
    session: int
    timeout_s: float

    def fork(
        self, route: Route, number: int, fork: int, num_tokens: int | None
    ) -> list[concurrent.futures.Future[object]]:
        """Ask each stage to copy the KV that it holds, before step `number`, as that of session `fork`.

        `num_tokens` is how many of the first tokens are copied; None: all.
        """
        return [
            self.engine.request(
                device,
                ForkSession(
                    request=self.engine.next_request(),
                    model=self.model,
                    plan_version=route.version,
                    stage=stage,
                    session=self.session,
                    number=number,
                    fork=fork,
                    num_tokens=num_tokens,
                ),
                "copying KV",
                self.timeout_s,
            )
            for stage, device in enumerate(route.stage_devices)
        ]

    def join(self, route: Route, parts: tuple[JoinedRows, ...]) -> list[concurrent.futures.Future[object]]:
        """Ask each stage to make this session of the rows of others, which end."""
        return [
            self.engine.request(
                device,
                JoinSessions(
                    request=self.engine.next_request(),
                    model=self.model,
                    plan_version=route.version,
                    stage=stage,
                    session=self.session,
                    parts=parts,
                ),
                "joining KV",
                self.timeout_s,
            )
            for stage, device in enumerate(route.stage_devices)
        ]

    def copy_kv(
        self, source: Route, target: Route, number: int, *, is_final: bool
    ) -> list[concurrent.futures.Future[object]]:
        """Copy the KV of all layers that have another device on another route, before step `number`."""
        futures = []
        for old, held in enumerate(source.plan.stages):
            for new, wanted in enumerate(target.plan.stages):
                start, end = max(held.start, wanted.start), min(held.end, wanted.end)
                if held.device == wanted.device or start >= end:
                    continue
                message = CopyKV(
                    request=self.engine.next_request(),
                    model=self.model,
                    plan_version=source.version,
                    stage=old,
                    session=self.session,
                    number=number,
                    start=start,
                    end=end,
                    target_version=target.version,
                    target_stage=new,
                    target_name=wanted.device,
                    is_final=is_final,
                )
                what = f"copying KV from device {held.device!r}"
                futures.append(self.engine.request(held.device, message, what, self.timeout_s, helpers=[wanted.device]))
        return futures

"""A stage that can't be put in service is reported to the caller, who waits for it."""

from __future__ import annotations

from typing import Any

from lingualinked.worker.background import Background
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey


def test_a_stage_that_can_not_be_edited_as_the_others_are_is_reported() -> None:
    stages, key = HostedStages("cpu", Background(lambda: None)), StageKey(1, 1, 0)
    stages._wanted.add(key)
    failure, reported = RuntimeError("no such tensor"), []

    def renew(*_: object) -> None:
        raise failure

    stages.edited.renew = renew  # type: ignore[method-assign]
    hosted: Any = type("Hosted", (), {"stage": None})()
    stages._put_in_service(key, hosted, lambda _: None, reported.append)
    assert reported == [failure]
    assert stages.find_stage(key) is None

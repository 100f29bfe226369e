"""What follows when a step fails, of one session or of several: the caller is told, and memory is freed.

Knows stages and failures; neither steps nor messages.
"""

from __future__ import annotations

from collections.abc import Callable

from lingualinked.model.process.memory import release_memory
from lingualinked.protocol.failures import FailureKind
from lingualinked.worker.messaging.error_report import ErrorReport, describe_error
from lingualinked.worker.process.limits import end_if_device_is_lost
from lingualinked.worker.stages.hosted_stages import HostedStages


def run_or_report(
    run: Callable[[], None], report: Callable[[ErrorReport], None], stages: HostedStages, accelerator: str
) -> bool:
    """Run a step, and return whether it has run; report why it failed if it did, and free memory if that was short."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 - the caller re-raises it
        failure = describe_error(error)
    else:
        return True
    report(failure)
    end_if_device_is_lost(accelerator)
    if failure["kind"] is FailureKind.MEMORY:
        stages.drop_idle_caches()
        release_memory(accelerator)  # of the step; the error referred to it until here
    return False

"""Checks that a batch-invariant model may run where its stages have been loaded.

Knows what stages report; not how they have found it out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lingualinked import environment, rounding
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.device import CALLER
from lingualinked.environment import Environments
from lingualinked.errors import UnsupportedOperationError
from lingualinked.protocol.messages import StageLoaded
from lingualinked.rounding import Invariance

_UNKNOWN = Invariance(fingerprint="", because="it did not find out how it rounds: leave batch_invariant out")


def check_invariance(routes: Routes, route: Route, loaded: Sequence[StageLoaded], environments: Environments) -> None:
    """Raise UnsupportedOperationError if a text's bits may depend on other texts on a route, or differ from those before."""
    found: dict[str, Invariance] = {}
    for device, answer in zip(route.stage_devices, loaded, strict=True):
        if device not in found or not found[device].because:
            found[device] = answer.invariance or _UNKNOWN
    known = {**routes.invariances, **found}
    own = {
        name: msgspec.structs.replace(each, threads=1)  # any number of threads has been found to give these bits
        for name, each in environments.items()
        if name in (CALLER, *known)
    }
    because = environment.describe_difference(own) or rounding.describe_variance(
        known, {name: each.processor for name, each in own.items()}
    )
    if because:
        raise UnsupportedOperationError(f"batch_invariant=True can't be promised: {because}")
    routes.invariances = known

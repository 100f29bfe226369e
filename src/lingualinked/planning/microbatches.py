"""How the rows of a batch are split into microbatches, which numbers of them change no bit, and how long they take.

Knows profiles and predictions; neither what parts cost nor who runs the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from lingualinked.planning.prediction import Prediction
from lingualinked.profile import Profile
from lingualinked.rounding import independent_rows
from lingualinked.workload import Workload

MOST_PER_DEVICE = 4
"""Microbatches that are tried at most for each device: with more, weights are only read more often."""


def split_rows(num_rows: int, num_microbatches: int, num_together: int = 1) -> tuple[int, ...]:
    """Return the rows of each microbatch, as even as can be, if so many in sequence stay together, as beams do."""
    num_groups = num_rows // num_together
    bounds = [num_groups * index // num_microbatches for index in range(num_microbatches + 1)]
    return tuple(num_together * (stop - start) for start, stop in itertools.pairwise(bounds))


def exact_numbers(profile: Profile, devices: Collection[str], workload: Workload) -> list[int]:
    """Return the numbers of microbatches in which a batch may run on some devices, all of which leave the bits as they are.

    That is one alone where the profile does not know what more rows cost, or how the devices round.
    """
    roundings = [profile.device(name).rounding for name in devices]
    known = [each for each in roundings if each is not None]
    least_rows = independent_rows(known) if len(known) == len(roundings) and knows_rows(profile) else 0
    most = MOST_PER_DEVICE * len(devices) if least_rows and len(devices) > 1 else 1
    return [1, *(number for number in range(2, most + 1) if workload.batch_size // number >= least_rows)]


def lockstep_s(predicted: Prediction) -> float:
    """Return the seconds in which a batch is answered if no microbatch begins its next step before all have ended theirs.

    The pipeline then fills and drains with every token.
    """
    others = (predicted.workload.num_microbatches or 1) - 1
    step_s = predicted.step_s + others * predicted.busiest_s(is_decode=True)
    return predicted.first_token_s + (predicted.workload.new_tokens - 1) * step_s


def knows_rows(profile: Profile) -> bool:
    """Say whether a profile has measured what more rows cost."""
    return all(len({step.rows for step in times.steps}) > 1 for each in profile.devices for times in each.layers)

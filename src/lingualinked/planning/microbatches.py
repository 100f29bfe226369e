"""How long a batch takes that runs as several microbatches, and the number of them that is fastest.

Knows predictions; neither what parts cost nor which numbers change no bit.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable

from lingualinked.planning.prediction import Prediction
from lingualinked.profile import Profile


def split_rows(num_rows: int, num_microbatches: int, num_together: int = 1) -> tuple[int, ...]:
    """Return the rows of each microbatch, as even as can be, if so many in sequence stay together, as beams do."""
    num_groups = num_rows // num_together
    bounds = [num_groups * index // num_microbatches for index in range(num_microbatches + 1)]
    return tuple(num_together * (stop - start) for start, stop in itertools.pairwise(bounds))


def batch_s(predicted: Prediction, num_microbatches: int, *, in_lockstep: bool, num_sessions: int = 1) -> float:
    """Return the seconds in which a batch is answered that runs as so many microbatches, each as predicted.

    In lockstep, the steps of all microbatches end before the next ones begin, so that the pipeline fills and drains with every
    token; else each goes on by itself. `num_sessions` such batches are in flight at once.
    """
    others = num_sessions * num_microbatches
    prefill, decode = _busiest_s(predicted, is_decode=False), _busiest_s(predicted, is_decode=True)
    first_s = max(predicted.first_token_s + (num_microbatches - 1) * prefill, others * prefill)
    step_s = predicted.step_s + (num_microbatches - 1) * decode if in_lockstep else predicted.step_s
    return first_s + (predicted.workload.new_tokens - 1) * max(step_s, others * decode)


def best_number(
    candidates: Iterable[int],
    predict: Callable[[int], Prediction],
    *,
    in_lockstep: bool = False,
    num_sessions: int = 1,
) -> int:
    """Return the number of microbatches with which a batch is answered first; of equal ones the smallest.

    `predict` returns what is predicted of one microbatch, for a number of them.
    """
    seconds = {
        number: batch_s(predict(number), number, in_lockstep=in_lockstep, num_sessions=num_sessions)
        for number in candidates
    }
    return min(seconds, key=lambda number: (seconds[number], number))


def knows_rows(profile: Profile) -> bool:
    """Say whether a profile has measured what more rows cost."""
    return all(len({step.rows for step in times.steps}) > 1 for each in profile.devices for times in each.layers)


def _busiest_s(predicted: Prediction, *, is_decode: bool) -> float:
    """Return the seconds of a step on the device or link that it keeps busy the longest."""
    devices: defaultdict[str, float] = defaultdict(float)
    for stage in predicted.stages:
        devices[stage.device] += stage.decode_s if is_decode else stage.prefill_s
    hops = [each.decode_transfer_s if is_decode else each.prefill_transfer_s for each in predicted.hops]
    return max(*devices.values(), *hops)

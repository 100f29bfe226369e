"""How much slower than it was measured a device is now, estimated from noisy step times: a level, and when it shifted.

Knows numbers and times; nothing of devices, plans or what is done about it.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections import deque

from lingualinked.control.stability import expected_stable_s

_WINDOWS = (5, 8, 16, 32, 64)
_MOST_SAMPLES = 256  # since the last shift, that the level stands on
_NOISE_EVERY = 16  # samples after which noise is estimated anew, once there are twice as many
_MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean, of normal noise
_MAD_SCALE = 1.4826  # standard deviation over median absolute deviation, likewise
_LEAST_NOISE = 0.03  # of step times: fewer samples than it takes to know better show less by chance
_FEWEST = 8  # samples from which noise is estimated
_FIRST_NOISE = 0.2  # assumed before that, and counted as so many samples later
_FIRST_WEIGHT = 2
_MOST_SHIFTS = 16


class SpeedLevel:
    """The slowdown of one device, as a level that holds until it has plainly shifted.

    Samples are logarithms of observed over predicted seconds. They are compared with the level through medians of the last
    few and of the last many: few show a large shift at once, many a small one, and a single outlier moves no median. A
    shift counts when a median differs by more than ``confidence`` standard errors. Between shifts the level follows the
    median of all samples since the last one.

    References
    ----------
    E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954, whose question this is; P. J. Rousseeuw and
    C. Croux, "Alternatives to the median absolute deviation", JASA 88, 1993, for the noise.
    """

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence
        self._samples: deque[float] = deque()
        self._sorted: list[float] = []
        self._count = 0
        self._level = 0.0
        self._noise = _FIRST_NOISE
        self._is_settled = False
        self._shifts: deque[tuple[float, float]] = deque(maxlen=_MOST_SHIFTS)

    @property
    def slowdown(self) -> float:
        """Observed over predicted seconds."""
        return math.exp(self._level)

    @property
    def num_samples(self) -> int:
        """Samples since the last shift that the level stands on; 256 at most."""
        return len(self._samples)

    @property
    def error(self) -> float:
        """Standard error of the level's logarithm."""
        return _MEDIAN_ERROR * self._noise / math.sqrt(max(1, len(self._samples)))

    @property
    def is_settled(self) -> bool:
        """Whether there have been enough samples to know the level."""
        return self._is_settled

    def expected_stable_s(self, time_s: float, horizon_s: float, size: float) -> float:
        """Return the seconds for which it is expected not to shift by ``size``, the logarithm of a factor."""
        return expected_stable_s([at_s for at_s, shift in self._shifts if abs(shift) >= size], time_s, horizon_s)

    def add(self, time_s: float, observed_s: float, predicted_s: float) -> bool:
        """Learn from one step's time; return whether the level has shifted. Seconds that are not positive tell nothing."""
        if not (observed_s > 0 and predicted_s > 0):
            return False
        self._add_sample(math.log(observed_s / predicted_s))
        shift = self._shift()
        if shift is None:
            if len(self._sorted) >= _FEWEST:
                self._level = _middle(self._sorted)
                if not self._is_settled or len(self._sorted) < 2 * _NOISE_EVERY or self._count % _NOISE_EVERY == 0:
                    self._noise = _noise_of(self._sorted, self._level)
                self._is_settled = True
            elif not self._is_settled:
                self._level = _middle(self._sorted)
            return False
        window, level = shift
        self._shifts.append((time_s, level - self._level))
        self._level = level
        self._samples = deque(_last(self._samples, window))
        self._sorted = sorted(self._samples)
        return True

    def _add_sample(self, sample: float) -> None:
        self._count += 1
        self._samples.append(sample)
        bisect.insort(self._sorted, sample)
        if len(self._samples) > _MOST_SAMPLES:
            del self._sorted[bisect.bisect_left(self._sorted, self._samples.popleft())]

    def _shift(self) -> tuple[int, float] | None:
        """Return the shortest window that shows a shift, and the level that it shows; None if none does."""
        if not self._is_settled:
            return None
        for window in _WINDOWS:
            if window > len(self._samples):
                return None
            if self._count % (window // _WINDOWS[0]):
                continue  # long ones change slowly
            level = _middle(sorted(_last(self._samples, window)))
            # Logarithms of times are skewed, and few of them are further from normal than many.
            error = (1 + 2 / window) * _MEDIAN_ERROR * self._noise / math.sqrt(window)
            if abs(level - self._level) > self._confidence * error:
                return window, level
        return None


def _last(samples: deque[float], num: int) -> list[float]:
    return list(itertools.islice(reversed(samples), num))[::-1]


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _noise_of(samples: list[float], level: float) -> float:
    seen = max(_LEAST_NOISE, _MAD_SCALE * statistics.median(abs(sample - level) for sample in samples))
    weighted = _FIRST_WEIGHT * _FIRST_NOISE**2 + len(samples) * seen**2
    return math.sqrt(weighted / (_FIRST_WEIGHT + len(samples)))

"""The requests of a simulation: which step each session issues next, and when each token was there.

Knows the caller's side; no servers.
"""

from __future__ import annotations

import math

import numpy as np

from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.simulation.stretch import DECODE, PREFILL


class Requests:
    """R requests of T tokens over at most S sessions at a time.

    Parameters
    ----------
    num_requests, num_tokens, num_sessions : int
        R, T, S.
    arrivals_s : ndarray or None
        float64 ``[R]``, ascending, when each arrives; None if requests always wait.

    Attributes
    ----------
    arrive : bool
        Whether requests arrive; else they always wait.
    kinds : list of int
        Of each session: `PREFILL` or `DECODE`, what its step is.
    running : list of int
        Of each session: its request.
    first_s : list of float
        Of each session: when it issues its first step.
    """

    def __init__(self, num_requests: int, num_tokens: int, num_sessions: int, arrivals_s: Floats | None) -> None:
        self.arrive = arrivals_s is not None
        self.num_sessions = min(num_sessions, num_requests)
        self.kinds = [PREFILL] * self.num_sessions
        self.running = list(range(self.num_sessions))
        self.first_s = [0.0] * self.num_sessions if arrivals_s is None else arrivals_s[: self.num_sessions].tolist()
        self._num_tokens = num_tokens
        self._arrivals_s = [-math.inf] * num_requests if arrivals_s is None else arrivals_s.tolist()
        self._started_s = self.first_s + self._arrivals_s[self.num_sessions :]
        self._tokens_s = np.empty(num_requests * num_tokens)
        self._next_token = [request * num_tokens for request in self.running]
        self._end = [token + num_tokens for token in self._next_token]
        self._num_taken = self.num_sessions

    def take_back(self, session: int, now_s: float) -> float:
        """Record that a step is back; return since when the session's next one could have been issued.

        Returns
        -------
        float
            Before `now_s`: it is to be issued now. Otherwise that is when the next request arrives; infinite if there
            is none. Sessions are alike, so that one which is free takes the next request even if that is still to come.
        """
        token = self._next_token[session]
        self._tokens_s[token] = now_s
        self._next_token[session] = token = token + 1
        if token < self._end[session]:
            self.kinds[session] = DECODE
            return -math.inf
        request = self._num_taken
        if request == len(self._arrivals_s):
            return math.inf
        self._num_taken += 1
        self.kinds[session], self.running[session] = PREFILL, request
        self._next_token[session] = request * self._num_tokens
        self._end[session] = self._next_token[session] + self._num_tokens
        arrived_s = self._arrivals_s[request]
        if not self.arrive:
            self._started_s[request] = now_s
        return arrived_s

    def started_s(self) -> Floats:
        """Return float64 ``[R]``, the seconds at which each arrived or, where requests always wait, was issued."""
        return np.array(self._started_s)

    def tokens_s(self) -> Floats:
        """Return float64 ``[R, T]``, the seconds at which each token was there."""
        return self._tokens_s.reshape(-1, self._num_tokens)

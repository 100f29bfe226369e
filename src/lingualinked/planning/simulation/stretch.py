"""A stretch of servers that steps pass one behind the other: when a step that enters comes out.

Knows one step at a time, in the order of entry; not sessions, nor what lies before and after.
"""

from __future__ import annotations

import math

import numpy as np

from lingualinked.planning.placement.problem import Floats

PREFILL, DECODE = 0, 1


class Stretch:
    r"""First-in-first-out servers in a row, each visited here and nowhere else.

    No step overtakes another in such a row, so that a step's whole way through it follows from the way of the step
    before. With :math:`s_v` the time at server v, :math:`p_v` the unhindered time from the entry at :math:`t` to v, and
    :math:`f_v` when the step before leaves v, the step starts there at

    .. math:: b_v = p_v + \max(t, \max_{w \le v} (f_w - p_w)),

    a running maximum over the servers: one array operation for all of them. Where the step before is so far ahead
    that they can't meet, :math:`b_v = p_v + t`, and not even that is needed.

    Parameters
    ----------
    prefill_s, decode_s : ndarray
        float64 ``[V]``, seconds at each server, for a step of either kind.
    delay_s : ndarray
        float64 ``[V]``, seconds from each to the next.

    References
    ----------
    .. [1] F. Baccelli, G. Cohen, G. J. Olsder, J.-P. Quadrat, "Synchronization and Linearity", Wiley 1992, chapter 1.
    """

    __slots__ = (
        "_alone",
        "_delay_s",
        "_ends",
        "_free",
        "_gap_s",
        "_kind",
        "_last_offsets",
        "_last_s",
        "_offsets",
        "_out_s",
        "_through_s",
        "_waits",
    )

    def __init__(self, prefill_s: Floats, decode_s: Floats, delay_s: Floats) -> None:
        self._delay_s = delay_s
        kinds = [self._unhindered(busy_s) for busy_s in (prefill_s, decode_s)]
        self._offsets = [offsets for offsets, _, _ in kinds]
        self._ends = [ends for _, ends, _ in kinds]
        self._through_s = [through_s for _, _, through_s in kinds]
        # Entries of two steps of these kinds that are at least so far apart never meet.
        self._gap_s = [[float((ends - offsets).max()) for offsets in self._offsets] for ends in self._ends]
        self._alone = True  # the step before met nobody: its entry and kind say all
        self._last_s, self._kind = -math.inf, DECODE
        self._out_s = -math.inf
        self._free = np.full(delay_s.shape, -math.inf)
        self._last_offsets, self._waits = self._offsets[DECODE], np.empty_like(delay_s)

    def enter(self, now_s: float, kind: int) -> float:
        """Send a step in, not before the last one; give the seconds at which it comes out.

        Parameters
        ----------
        now_s : float
            When it enters.
        kind : int
            `PREFILL` or `DECODE`.
        """
        if self._alone:
            if now_s >= self._last_s + self._gap_s[self._kind][kind]:
                self._last_s, self._kind = now_s, kind
                return self._leave(now_s + self._through_s[kind])
            np.add(self._ends[self._kind], self._last_s, out=self._free)
        self._kind = kind
        return self._leave(self._pass(now_s, self._offsets[kind], self._ends[kind]) + self._through_s[kind])

    def enter_with(self, now_s: float, busy_s: Floats) -> float:
        """Send a step in that has service times of its own, float64 ``[V]``; give when it comes out."""
        offsets, ends, through_s = self._unhindered(busy_s)
        out_s = self._leave(self._pass(now_s, offsets, ends) + through_s)
        self._alone = False
        return out_s

    def last_starts(self) -> Floats:
        """Return float64 ``[V]``, the seconds at which the step that entered last starts at each server."""
        return self._offsets[self._kind] + self._last_s if self._alone else self._last_offsets + self._waits

    def _leave(self, out_s: float) -> float:
        """Let rounding not make a step overtake the one before."""
        self._out_s = out_s = max(out_s, self._out_s)
        return out_s

    def _pass(self, now_s: float, offsets: Floats, ends: Floats) -> float:
        free, waits = self._free, self._waits
        self._last_offsets = offsets
        np.subtract(free, offsets, out=free)
        if free[0] < now_s:
            free[0] = now_s
        np.maximum.accumulate(free, out=waits)
        np.add(waits, ends, out=free)
        last = float(waits[-1])
        self._alone = last == now_s
        self._last_s = now_s
        return last

    def _unhindered(self, busy_s: Floats) -> tuple[Floats, Floats, float]:
        leaves = np.cumsum(busy_s + self._delay_s)
        offsets = np.concatenate(([0.0], leaves[:-1]))
        return offsets, offsets + busy_s, float(leaves[-1])

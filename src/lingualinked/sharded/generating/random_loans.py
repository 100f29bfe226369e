"""The state of torch's random number generator, lent to one run at a time: two with the same state would draw the same numbers.

Knows torch's generator and the loops that sample; neither runs nor stages.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from lingualinked.model.sampling.choosing import skip_draws

_lock = threading.RLock()
_loans: list[RandomLoan] = []  # of all loops that sample in this process


class RandomLoan:
    """One loop's part: it lends the state while no other loop samples, and advances torch's own generator with each token.

    ``num_rows`` and ``vocabulary`` are the shape of what a token of each row is drawn from.
    """

    def __init__(self, num_rows: int, vocabulary: int) -> None:
        self._size = num_rows, vocabulary
        self._lent: Tensor | None = None  # the state that the stages draw the next token with
        self._lends = True
        self._is_first_due = False  # whether the stages draw the first token of a run, or have drawn it
        self._is_first_paid = False  # whether another loop has advanced the generator past that token
        with _lock:
            _loans.append(self)

    def close(self) -> None:
        """End the loop."""
        with _lock:
            if self in _loans:
                _loans.remove(self)

    def may_lend(self) -> bool:
        """Return whether the stages may draw: no other loop samples, and nothing else has drawn in between."""
        with _lock:
            return self._lends and len(_loans) == 1

    def lend(self) -> Tensor:
        """Return the state for a run that begins."""
        with _lock:
            self._lent, self._is_first_due = torch.get_rng_state(), True
            return self._lent

    def receive_token(self) -> bool:
        """Advance the generator past a token that has arrived; return False if it was drawn with numbers that are used already.

        So it is if something in this process has drawn meanwhile, except for the first token of a run: it was drawn before.
        """
        with _lock:
            is_first, is_paid = self._is_first_due, self._is_first_paid
            self._is_first_due = self._is_first_paid = False
            if not is_first and not (self._lent is not None and torch.equal(torch.get_rng_state(), self._lent)):
                self._lends = False
                return False
            if not is_paid:
                skip_draws(*self._size)
                self._lent = torch.get_rng_state()
            return True

    def draw(self, probabilities: Tensor) -> Tensor:
        """Draw a token of each row, int64 ``[rows]``, in this process."""
        with _lock:
            self.call_back_others()
            return torch.multinomial(probabilities, num_samples=1).squeeze(1)

    def call_back_others(self) -> None:
        """Advance the generator past what stages may have drawn for other loops already, which lend nothing after that."""
        with _lock:
            for other in _loans:
                if other is not self:
                    other.pay_first()

    def pay_first(self) -> None:
        """Advance the generator past the first token of a run that is under way; `receive_token` does it no more."""
        if self._is_first_due and not self._is_first_paid:
            skip_draws(*self._size)
            self._is_first_paid = True


@contextlib.contextmanager
def drawing_here() -> Iterator[None]:
    """Draw tokens with torch's generator in this context, in which no loop lends its state."""
    loan = RandomLoan(0, 0)
    try:
        loan.call_back_others()
        yield
    finally:
        loan.close()

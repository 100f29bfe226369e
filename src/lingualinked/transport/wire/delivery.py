"""One message as it was received.

Knows no mailbox and no wire format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Delivery:
    """One message as it was received."""

    sender: str  # under which the receiver authorised the key that it came with; never taken from the message
    payload: bytes
    tensors: tuple[Tensor, ...]  # contiguous, on the CPU, in memory that nothing else uses
    num_bytes: int  # before encryption, however they travelled
    decode_s: float = 0.0
    same_host: bool = True  # as its sender; only then do both read one clock
    due_s: float = 0.0  # when it was due on an emulated link (monotonic seconds); 0 on other links

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
    """One message as it was received.

    Parameters
    ----------
    sender : str
        Name under which the receiver authorised the key that the message came with; never taken from the message.
    payload : bytes
        The sender's payload.
    tensors : tuple of torch.Tensor
        The tensors in the order in which they were sent: contiguous, on the CPU, in memory that nothing else uses.
    num_bytes : int
        Bytes of all frames, before encryption.
    decode_s : float
        Seconds spent decoding it.
    due_s : float
        When it was due on an emulated link (monotonic seconds); 0 on other links.
    """

    sender: str
    payload: bytes
    tensors: tuple[Tensor, ...]
    num_bytes: int
    decode_s: float = 0.0
    due_s: float = 0.0

"""How large messages and their frames may be.

Knows numbers only; imports no torch.
"""

from __future__ import annotations

from lingualinked.errors import ArgumentError

# A frame is encrypted, sent and decrypted as a whole. With frames of 1 MiB these overlap, so that 32 MiB arrive in half the
# time that a single frame takes. Smaller frames gain nothing more.
DEFAULT_MAX_FRAME_BYTES = 1 << 20
DEFAULT_MAX_MESSAGE_BYTES = 4 << 30
MAX_NUM_FRAMES = 1 << 16
MAX_NUM_TENSORS = 1 << 10
MAX_NUM_DIMS = 16

# Between processes of one machine, tensors of at least so many bytes in a message go through shared memory.
MIN_SHARED_BYTES = 16 << 10
RING_BYTES = 256 << 20  # of that memory, from one party to another; only as much is touched as is unread at once
KEPT_RING_BYTES = 64 << 20  # more than this is returned once it is not needed

MIN_FRAME_BYTES = 256 << 10
"""Everything but tensors travels in one frame: a worker's error with its traceback takes most."""


def check_frame_limit(max_frame_bytes: object) -> int:
    """Return the largest size of a frame, in bytes, or raise ArgumentError if it is too small for some messages."""
    if not isinstance(max_frame_bytes, int):
        raise ArgumentError(f"max_frame_bytes={max_frame_bytes!r} must be a whole number")
    if max_frame_bytes < MIN_FRAME_BYTES:
        raise ArgumentError(
            f"max_frame_bytes={max_frame_bytes} can't carry every message: give {MIN_FRAME_BYTES} ({MIN_FRAME_BYTES >> 10} KiB) "
            "or more"
        )
    return max_frame_bytes

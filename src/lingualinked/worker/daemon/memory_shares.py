"""How a daemon shares out memory: a number of bytes, of which each lease takes some until it ends.

Knows numbers; neither callers nor processes.
"""

from __future__ import annotations

from lingualinked.errors import ResourceError
from lingualinked.quantities import bytes_text


class MemoryShares:
    """The memory that all leases together may take, in bytes; ``None``: any."""

    def __init__(self, total_bytes: int | None) -> None:
        self._total_bytes = total_bytes
        self._leased: dict[bytes, int] = {}

    @property
    def left_bytes(self) -> int | None:
        """The memory that is not leased; ``None``: no limit is set."""
        return None if self._total_bytes is None else self._total_bytes - sum(self._leased.values())

    def lease(self, holder: bytes, asked_bytes: int | None) -> int | None:
        """Lease what is asked for, or all that is left; return the bytes, ``None`` if there is no limit.

        Raises ResourceError if that much is not left.
        """
        left = self.left_bytes
        granted = left if asked_bytes is None else asked_bytes
        if left is not None and granted is not None:
            if granted > left or left == 0:
                asked = "memory" if asked_bytes is None else bytes_text(asked_bytes)
                raise ResourceError(
                    f"{asked} is not free: of {bytes_text(self._total_bytes or 0)} that it may lease, {bytes_text(left)} are not "
                    "leased; state a smaller memory= of the device, close other clusters on it, or start it with a larger --memory"
                )
            self._leased[holder] = granted
        return granted

    def release(self, holder: bytes) -> None:
        """End a lease; does nothing if there is none."""
        self._leased.pop(holder, None)

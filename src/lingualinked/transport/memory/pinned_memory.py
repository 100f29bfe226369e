"""Memory that a CUDA device can copy to without a detour.

Knows an address and CUDA's runtime; nothing of what lies there.
"""

from __future__ import annotations

import contextlib
import logging

import torch

logger = logging.getLogger("lingualinked.transport")


class PinnedMemory:
    """A range of memory, registered with CUDA until it is released; if CUDA refuses, copies to it work all the same."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self._address = address
        self._is_registered = False
        try:
            error = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
            self._is_registered = error == 0
        except Exception:  # whatever it is, the memory stays usable
            logger.debug("memory could not be registered with CUDA", exc_info=True)
        else:
            if error:
                logger.debug("memory could not be registered with CUDA: error %d", error)
                _clear_error()

    def release(self) -> None:
        """Unregister the memory, before it is unmapped; does nothing the second time."""
        if self._is_registered:
            self._is_registered = False
            with contextlib.suppress(Exception):  # the device is lost, say; the memory is unmapped anyway
                torch.cuda.cudart().cudaHostUnregister(self._address)


def _clear_error() -> None:
    """Make CUDA forget its last error, which torch would otherwise raise for the next kernel that it starts."""
    with contextlib.suppress(Exception):
        torch.empty(1, device="cuda").zero_()

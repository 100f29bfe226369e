"""Torch's device for the name of an accelerator."""

from __future__ import annotations

import torch

from lingualinked.errors import ArgumentError


def accelerator_device(accelerator: str) -> torch.device:
    """Return torch's device for the name of an accelerator, or raise ArgumentError if torch can't compute on it."""
    try:
        device = torch.device(accelerator)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"torch can't compute on accelerator {accelerator!r} ({error}): use 'cpu', 'cuda:N' or 'mps', if this "
            "machine and this build of torch have it"
        ) from error
    return device

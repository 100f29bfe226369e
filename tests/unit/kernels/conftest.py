"""What a test makes a probe find is not kept for others."""

from __future__ import annotations

from kernel_checks import nothing_is_kept

__all__ = ["nothing_is_kept"]

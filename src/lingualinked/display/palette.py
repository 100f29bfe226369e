"""The colours of figures: within one figure, each colour has one meaning.

Knows meanings and colours; draws nothing.
"""

from __future__ import annotations

WEIGHTS, KV, WORKING = "#4c78a8", "#f58518", "#bab0ac"
"""Parts of memory."""
PREFILL, DECODE = ("#d9660a", "#f58518", "#f9a655", "#fcc78f"), ("#2f5a8c", "#4c78a8", "#7fa3cb", "#b3cae4")
"""Kinds of steps, with a shade per session."""
PLAIN, LIMITING = "#7d8ca3", "#c44e52"
"""An ordinary device or link; the bottleneck."""
MOVED, FAILED = "#8c8c8c", "#c44e52"
"""A migration that succeeded; one that failed."""
DEVICES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#72b7b2", "#eeca3b", "#9d755d", "#d67195")
"""Lines of devices; none has the colour of a failure."""

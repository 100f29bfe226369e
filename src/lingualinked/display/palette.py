"""Colours of pictures: within one, each has one meaning.

Knows meanings and colours; not what is drawn.
"""

from __future__ import annotations

WEIGHTS, KV, WORKING = "#4c78a8", "#f58518", "#bab0ac"
"""Parts of memory."""
PREFILL, DECODE = ("#d9660a", "#f58518", "#f9a655", "#fcc78f"), ("#2f5a8c", "#4c78a8", "#7fa3cb", "#b3cae4")
"""Kinds of steps, in a shade per session."""
PLAIN, LIMITING = "#7d8ca3", "#c44e52"
"""A device or link that does not limit the pipeline; the one that does."""
MOVED, FAILED = "#8c8c8c", "#c44e52"
"""A migration that succeeded; one that failed."""
DEVICES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#72b7b2", "#eeca3b", "#9d755d", "#d67195")
"""Devices over time, where a line has no place of its own: none in the colour of what failed."""

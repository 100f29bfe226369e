"""Converts steps to a pandas data frame.

Knows pandas, an extra that is imported only for this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lingualinked.errors import ArgumentError
from lingualinked.telemetry.samples import StepSample

if TYPE_CHECKING:
    import pandas as pd

STEP_COLUMNS = {
    "time_s": "float64",
    "session": "int64",
    "number": "int64",
    "plan_version": "int64",
    "rows": "int64",
    "tokens": "int64",
    "context": "int64",
    "total_s": "float64",
}
STAGE_COLUMNS = {
    "device": "str",
    "start": "int64",
    "end": "int64",
    "hop_s": "float64",
    "wait_s": "float64",
    "compute_s": "float64",
    "codec_s": "float64",
    "sent_bytes": "int64",
}


def steps_frame(steps: Iterable[StepSample]) -> pd.DataFrame:
    """Make a data frame with one row per step and stage."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ArgumentError("to_pandas() needs pandas: pip install 'lingualinked[pandas]'") from error

    rows = [
        [
            *(getattr(step, name) for name in STEP_COLUMNS),
            position,
            *(getattr(stage, name) for name in STAGE_COLUMNS),
        ]
        for step in steps
        for position, stage in enumerate(step.stages)
    ]
    dtypes = {**STEP_COLUMNS, "stage": "int64", **STAGE_COLUMNS}
    columns = zip(*rows, strict=True) if rows else ((),) * len(dtypes)
    return pd.DataFrame(
        {name: pd.Series(values, dtype=dtype) for (name, dtype), values in zip(dtypes.items(), columns, strict=True)}
    )

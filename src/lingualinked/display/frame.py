"""Converts steps to a pandas data frame.

Knows pandas, an extra that is imported only for this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lingualinked.errors import ArgumentError
from lingualinked.telemetry.samples import StageTiming, StepSample

if TYPE_CHECKING:
    import pandas as pd

_DTYPES = {"float": "float64", "int": "int64", "str": "str"}


def _columns(record: type[StepSample | StageTiming]) -> dict[str, str]:
    """Return the dtype of each field that is a number or a text."""
    return {field.name: _DTYPES[field.type] for field in dataclasses.fields(record) if field.type in _DTYPES}


def steps_frame(steps: Iterable[StepSample]) -> pd.DataFrame:
    """Make a data frame with one row per step and stage."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ArgumentError("to_pandas() needs pandas: pip install 'lingualinked[pandas]'") from error

    of_step, of_stage = _columns(StepSample), _columns(StageTiming)
    rows = [
        [*(getattr(step, name) for name in of_step), position, *(getattr(stage, name) for name in of_stage)]
        for step in steps
        for position, stage in enumerate(step.stages)
    ]
    dtypes = {**of_step, "stage": "int64", **of_stage}
    columns = zip(*rows, strict=True) if rows else ((),) * len(dtypes)
    return pd.DataFrame(
        {name: pd.Series(values, dtype=dtype) for (name, dtype), values in zip(dtypes.items(), columns, strict=True)}
    )

"""A plan as a table.

Knows plans; not how they are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.display.tables import Rows
from lingualinked.display.units import bytes_text

if TYPE_CHECKING:
    from lingualinked.planning.plan import Plan


def plan_rows(plan: Plan) -> Rows:
    """Put a plan into rows: stage, device, layers, bytes."""
    largest = max(stage.weight_bytes for stage in plan.stages) or 1
    exact = "exact" if plan.exact else f"not exact: {plan.inexact_because}"
    return Rows(
        title=f"Plan: {plan.num_layers} layers in {len(plan.stages)} stages ({exact})",
        columns=("device", "stage", "layers", "number", "weights"),
        rows=[
            (
                stage.device,
                str(index),
                f"[{stage.start}, {stage.end})",
                str(stage.num_layers),
                bytes_text(stage.weight_bytes) if stage.weight_bytes else "?",
            )
            for index, stage in enumerate(plan.stages)
        ],
        bars=[stage.weight_bytes / largest for stage in plan.stages],
    )


def plan_text(plan: Plan) -> str:
    """Return the plan as a text table."""
    return plan_rows(plan).to_text()


def plan_html(plan: Plan) -> str:
    """Return the plan as an HTML table with a bar of each stage's bytes."""
    return plan_rows(plan).to_html()
